from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Kvq, Ran
from garbage import with_garbage_codebooks
from kvq_cli.output import Output
from kvq_cli.prompts import bundled_prompt
from kvq_cli.session import remember
from kvq_cli.sizes import parse_tokens, show_bytes
from kvq_formats.sidecar import Sidecar
from kvq_runtime import implementation
from kvq_runtime.memory import MemoryPlan, plan_memory
from tiny_models import make_text
from tiny_sidecars import make_sidecar

FEW = ("--max-new-tokens", 12)
GIVEN = ("-p", "they would go out")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def current(sidecar: Path) -> Path:
    """The sidecar, as the one that was made last."""
    remember(sidecar, Output())
    return sidecar


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", load)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(count: int) -> None:
        monkeypatch.setattr("kvq_runtime.memory.available_bytes", lambda _: count)

    return set_to


def error_of(ran: Ran) -> tuple[str, str]:
    error = ran.json["error"]
    return error["message"], error["hint"]


def notes(ran: Ran) -> str:
    return ran.stderr


def test_after_calibrate_nothing_need_be_said(kvq: Kvq, embedded: Path, text_file: Path) -> None:
    small = ("--num-samples", 2, "--seq-len", 128, "--dataset", text_file)
    assert kvq("calibrate", "--bits", 3, *small).code == 0
    ran = kvq("generate")
    assert ran.code == 0
    # The text alone, and not the prompt.
    assert ran.stdout.endswith("\n")
    assert bundled_prompt() not in ran.stdout
    lines = ran.stderr.splitlines()
    folder = Path("tiny-llama-kvq3").absolute()
    assert lines[0].startswith("Note: no prompt is given: the bundled one is continued")
    assert f"Note: using the current sidecar, {folder}" in lines
    assert any(line.startswith("Note: memory: weights ") for line in lines)
    assert "Note: attention: reference (torch on cpu)" in lines
    assert "tokens read in" in ran.stderr
    assert "256 generated at" in ran.stderr
    assert "a second (wall clock); ended by: length" in ran.stderr
    assert "tokens are held in" in lines[-2]
    assert "a bf16 cache of them would need" in lines[-2]
    assert lines[-1] == f"Next: kvq eval --sidecar {folder} --path decode"


def test_the_three_commands_on_a_local_model(
    kvq: Kvq, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrate, eval, generate: only smaller, and with nothing more said."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir, "my-model")
    small = ("--num-samples", 2, "--seq-len", 128)
    calibrated = kvq("calibrate", "./my-model", "--bits", 3, *small)
    assert calibrated.code == 0
    sidecar = tmp_path / "my-model-kvq3"
    measured = kvq("eval", "--ppl", "wikitext2", "--limit", 1, "--seq-len", 64)
    assert measured.code == 0
    assert "my-model-kvq3" in measured.stdout
    assert measured.stderr.splitlines()[-1] == f"Next: kvq generate --sidecar {sidecar}"
    ran = kvq("generate", "--context", "1M", *FEW)
    assert ran.code == 0
    assert "memory for 1,048,576 tokens:" in ran.stderr
    assert "tokens are held in" in ran.stderr


def test_json_is_one_object_with_everything(
    kvq: Kvq, current: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(make_text(250, seed=3))
    arguments = ("generate", tiny_model_dir, "--prompt-file", "prompt.txt", "--context", "1k")
    ran = kvq(*arguments, *FEW, "--json")
    assert ran.code == 0
    found = ran.json
    assert found["schema"] == "kvq.generate/1"
    assert found["prompt_source"] == "file"
    # Enough for pages whose codes are read.
    assert 512 < found["prompt_tokens"] < 1000
    assert found["generated_tokens"] == 12
    assert found["finish_reason"] == "length"
    # The last token is never fed.
    assert found["tokens_held"] == found["prompt_tokens"] + 12 - 1
    assert found["allocated_bytes"] == found["plan"]["cache_bytes"]
    assert 0 < found["held_bytes"] <= found["allocated_bytes"]
    # 2 layers, keys and values of 2 heads of 16 numbers, 2 bytes each.
    assert found["bf16_bytes"] == 2 * 2 * 2 * 16 * 2 * found["tokens_held"]
    assert found["effective_bits"] == pytest.approx(
        16 * found["held_bytes"] / found["bf16_bytes"], abs=1e-4
    )
    assert found["plan"]["context"] == 1024
    assert found["plan"]["fits"] is True
    assert found["implementation"]["name"] == "reference"
    assert found["device"] == "cpu"
    assert found["rule"] == "runtime"
    assert found["sampling"] == {
        "temperature": 0, "top_p": None, "top_k": None, "repetition_penalty": None, "seed": 0,
    }  # fmt: skip
    assert found["wall_clock"]["prefill_seconds"] > 0
    assert found["wall_clock"]["decode_tokens_per_second"] > 0
    assert found["sidecar"]["path"] == str(current)
    assert found["base_model"]["id"] == str(tiny_model_dir)
    plain = kvq(*arguments, *FEW)
    assert plain.stdout.removesuffix("\n") == found["text"].removesuffix("\n")


def test_the_text_is_that_of_the_codes(kvq: Kvq, sidecar: Path, tmp_path: Path) -> None:
    garbage = with_garbage_codebooks(Sidecar.load(sidecar)).save(tmp_path / "garbage")
    (tmp_path / "prompt.txt").write_text(make_text(250, seed=3))
    texts = [
        kvq("generate", "--sidecar", path, "--prompt-file", "prompt.txt", *FEW, "-q").stdout
        for path in (sidecar, sidecar, garbage)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_quiet_prints_the_text_alone(kvq: Kvq, current: Path) -> None:
    ran = kvq("generate", "-q", *GIVEN, *FEW)
    assert ran.code == 0
    assert ran.stderr == ""
    assert ran.stdout.strip()


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_how_the_prompt_is_fed_does_not_matter(kvq: Kvq, current: Path, chunk: int) -> None:
    ran = kvq("generate", "--prefill-chunk", chunk, *GIVEN, *FEW, "--json")
    assert ran.json["plan"]["prefill_chunk"] == chunk
    assert ran.json["text"] == kvq("generate", *GIVEN, *FEW, "--json").json["text"]


def test_a_prompt_from_stdin(kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, f"{GIVEN[1]}\n".encode())
    os.close(writing)
    with os.fdopen(reading) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        ran = kvq("generate", *FEW, "--json")
    assert ran.json["prompt_source"] == "stdin"
    assert ran.json["text"] == kvq("generate", *GIVEN, *FEW, "--json").json["text"]


def test_sampling_is_repeated_by_its_seed(kvq: Kvq, current: Path) -> None:
    options = ("--temperature", 1.2, "--top-p", 0.95, "--top-k", 100, "--repetition-penalty", 1.1)

    def text(seed: int) -> str:
        found = kvq("generate", *GIVEN, *options, "--seed", seed, *FEW, "--json").json
        assert found["sampling"] == {
            "temperature": 1.2, "top_p": 0.95, "top_k": 100, "repetition_penalty": 1.1,
            "seed": seed,
        }  # fmt: skip
        return str(found["text"])

    torch.manual_seed(1)
    first = text(3)
    torch.manual_seed(2)
    assert text(3) == first != text(4)


def test_a_prompt_longer_than_the_context(kvq: Kvq, current: Path, no_weights: None) -> None:
    long = ("-p", make_text(2000))
    plain = kvq("generate", "--context", "1k", *long, "--json")
    assert plain.code == 1
    message, hint = error_of(plain)
    assert plain.json["error"]["type"] == "DataError"
    tokens = int(message.split(" tokens")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert tokens > 1024
    assert message == (
        f"the prompt has {tokens:,} tokens; --context 1k holds 1,024, a new one among them."
    )
    # The hint is the shortest context that has room for the new tokens, too.
    offered = int(hint.split()[1].removesuffix("k,")) * 1024
    assert tokens + 256 <= offered < tokens + 256 + 1024


def test_a_context_that_ends_before_the_new_tokens(kvq: Kvq, current: Path) -> None:
    whole = kvq("generate", *GIVEN, "--max-new-tokens", 50, "--json").json
    context = whole["prompt_tokens"] + 5
    ran = kvq("generate", *GIVEN, "--max-new-tokens", 50, "--context", context, "--json")
    assert ran.code == 0
    assert ran.json["finish_reason"] == "context"
    assert ran.json["generated_tokens"] == 5
    assert "Note: at most 5 new tokens, not 50" in notes(ran)
    assert "--context 1k has room for all" in notes(ran)
    full = kvq("generate", *GIVEN, "--context", whole["prompt_tokens"], "--json")
    assert full.code == 1
    assert "a new one among them" in error_of(full)[0]


def test_the_plan_comes_in_full_with_a_context_and_before_the_weights(
    kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def load(*_: object, **__: object) -> None:
        seen.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    monkeypatch.setattr("kvq_runtime.models.load_model", load)
    kvq("generate", *GIVEN, "--context", "2k")
    kvq("generate", *GIVEN, "-v")
    kvq("generate", *GIVEN)
    for full in seen[:2]:
        for what in ("weights ", "cache ", "a bf16 cache would need", "scratch ", "total "):
            assert what in full
    assert "Note: memory for 2,048 tokens:\n" in seen[0]
    assert "Note: memory: weights " in seen[2]
    assert "total" not in seen[2]


def test_beyond_the_trained_positions_is_a_warning(kvq: Kvq, current: Path) -> None:
    inside = kvq("generate", *GIVEN, *FEW, "--context", "1k")
    assert "Warning" not in inside.stderr
    beyond = kvq("generate", *GIVEN, *FEW, "--context", "2k", "-q")
    assert beyond.code == 0
    assert beyond.stderr.startswith(
        "Warning: a context of 2,048 tokens is beyond the 1,024 positions that the model was "
        "trained for"
    )
    wanted = kvq("generate", *GIVEN, "--max-new-tokens", 1020, "-q", "--context", 1025)
    assert "Warning: a context of 1,025" in wanted.stderr


def planned(model: Path, sidecar: Path, **options: Any) -> MemoryPlan:
    return plan_memory(model, sidecar, **{"context": 64 * 1024, "device": "cpu", **options})


@pytest.mark.usefixtures("no_weights")
def test_what_cannot_fit_is_refused_with_what_would(
    kvq: Kvq, current: Path, tiny_model_dir: Path, available: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = planned(tiny_model_dir, current)
    room = plan.total - plan.cache // 8
    available(room)
    ran = kvq("generate", *GIVEN, "--context", "64k", "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "NotEnoughMemoryError"
    message, hint = error_of(ran)
    assert message.startswith("65,536 tokens do not fit into memory: weights ")
    for count in (plan.weights, plan.cache, plan.scratch, plan.total, room):
        assert show_bytes(count) in message
    context, *others = hint.split(", or ")
    # A cache of 2 bits is smaller by more than an eighth than one of 3.
    assert f"kvq calibrate {tiny_model_dir} --bits 2" in others
    offered = parse_tokens(context.removeprefix("--context "), flag="--context")
    assert planned(tiny_model_dir, current, context=offered).total <= room
    assert planned(tiny_model_dir, current, context=offered + 2 * 1024).total > room

    def loaded(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvq_runtime.models.load_model", loaded)
    assert kvq("generate", *GIVEN, *context.split(), "--json").code == 130


def test_layers_of_different_widths(
    kvq: Kvq, tiny_model_dir: Path, available: Callable[[int], None]
) -> None:
    mixed = make_sidecar(layer_bits={0: (2, 4), 1: (4, 3)}).save("mixed")
    Path("prompt.txt").write_text(make_text(250, seed=3))
    common = ("generate", tiny_model_dir, "--sidecar", mixed, "--prompt-file", "prompt.txt")
    ran = kvq(*common, *FEW, "--json")
    assert ran.code == 0
    assert ran.json["allocated_bytes"] == ran.json["plan"]["cache_bytes"]
    assert ran.json["sidecar"]["config"]["layer_bits"] == {"0": [2, 4], "1": [4, 3]}
    available(1000)
    assert "kvq calibrate test/tiny --bits 2" in error_of(kvq(*common, "--json"))[1]


@pytest.mark.usefixtures("no_weights")
def test_smaller_chunks_are_offered_where_they_are_enough(
    kvq: Kvq, current: Path, tiny_model_dir: Path, available: Callable[[int], None]
) -> None:
    enough = planned(tiny_model_dir, current, prefill_chunk=64).total
    arguments = ("generate", *GIVEN, "--context", "64k", "--json", "--prefill-chunk")
    available(enough)
    assert "--prefill-chunk 64" in error_of(kvq(*arguments, 8192))[1].split(", or ")
    available(enough - 1)
    for chunk in (64, 8192):
        assert "--prefill-chunk" not in error_of(kvq(*arguments, chunk))[1]


@pytest.mark.usefixtures("no_weights")
def test_a_smaller_type_is_offered_where_it_is_enough(
    kvq: Kvq, current: Path, tiny_model_dir: Path, available: Callable[[int], None]
) -> None:
    available(planned(tiny_model_dir, current, dtype="bfloat16").total)
    arguments = ("generate", *GIVEN, "--context", "64k", "--json")
    assert "--dtype bfloat16" in error_of(kvq(*arguments))[1].split(", or ")


@pytest.mark.usefixtures("no_weights")
def test_where_nothing_is_enough_all_that_helps_is_named(
    kvq: Kvq, current: Path, tiny_model_dir: Path, available: Callable[[int], None]
) -> None:
    available(1000)
    message, hint = error_of(kvq("generate", *GIVEN, "--json", "--context", "2k"))
    assert message.endswith("the largest context that fits is 0 tokens.")
    calibrate = f"kvq calibrate {tiny_model_dir} --bits 2"
    helpful = (calibrate, "--prefill-chunk 64", "--dtype bfloat16", "--load-in-4bit")
    assert hint == ", with ".join(helpful)
    long = ("-p", make_text(100), "--exact-prefill")
    exact = kvq("generate", *long, "--json")
    assert ", with --prefill-chunk 64 without --exact-prefill" in error_of(exact)[1]


def test_impl_is_never_swapped(
    kvq: Kvq, current: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "interprets", lambda: False)
    ran = kvq("generate", *GIVEN, "--impl", "triton", "--json")
    assert ran.code == 1
    message, hint = error_of(ran)
    assert "Triton kernels need a CUDA or ROCm GPU" in message
    assert "--impl reference" in hint


def test_exact_prefill_says_so(kvq: Kvq, current: Path) -> None:
    ran = kvq("generate", "--exact-prefill", *GIVEN, *FEW, "--json")
    assert ran.code == 0
    assert ran.json["rule"] == "exact-prefill"
    assert ran.json["plan"]["prefill_chunk"] == ran.json["prompt_tokens"]
    assert "made with --exact-prefill" in notes(ran)


@pytest.mark.parametrize(
    ("options", "code", "kind", "message", "hint"),
    [
        (("--context", "12q"), 2, "ConfigError", "--context is '12q'", "4096, 32k, 1M or 10M"),
        (("--context", "0"), 2, "ConfigError", "--context is '0'", "4096"),
        (("--context", "-1"), 2, "ConfigError", "--context is '-1'", "4096"),
        (("--context", "1e30"), 2, "ConfigError", "--context is '1e30'", "4096"),
        (("-p", "a", "--prompt-file", "b"), 2, "ConfigError", "-p and --prompt-file", "leave one"),
        (("-p", " \n"), 1, "DataError", "the prompt from -p is empty", "--prompt-file"),
        (("--prompt-file", "nowhere"), 1, "DataError", "no file nowhere", "-p"),
        (("--prompt-file", "."), 1, "DataError", "is a folder", "-p"),
        (
            ("--exact-prefill", "--prefill-chunk", 8),
            2, "ConfigError", "--exact-prefill reads the prompt in one piece", "leave one",
        ),
        (("--temperature", "-1"), 2, "ConfigError", "temperature is -1", "--temperature"),
        (("--temperature", "nan"), 2, "ConfigError", "temperature is nan", "--temperature"),
        (("--top-p", "0.9"), 2, "ConfigError", "top_p has no effect", "--temperature 0.7"),
        (("--seed", "-1"), 2, "ConfigError", "seed is -1", "--seed"),
        (("--max-new-tokens", 0), 2, "UsageError", "--max-new-tokens", "--help"),
        (("--prefill-chunk", 0), 2, "UsageError", "--prefill-chunk", "--help"),
        (("--impl", "cuda"), 2, "UsageError", "--impl", "--help"),
        (("--sidecar", "a", "--sidecar", "b"), 2, "ConfigError", "given 2 times", "--sidecar a"),
        (("--sidecar", "nowhere"), 1, "SidecarError", "nowhere", ""),
        (("--apply-chat-template",), 2, "ConfigError", "no chat template", "leave --apply"),
        (("--device-map", "toaster"), 2, "ConfigError", "'toaster' is no device", "cpu"),
        (("./nowhere",), 1, "ModelError", "nowhere", ""),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_weights")
def test_bad_input(
    kvq: Kvq,
    current: Path,
    options: tuple[object, ...],
    code: int,
    kind: str,
    message: str,
    hint: str,
) -> None:
    given = () if {"-p", "--prompt-file"} & set(options) else GIVEN
    ran = kvq("generate", *given, *options, "--json")
    assert ran.code == code
    assert ran.json["error"]["type"] == kind
    found, mends = error_of(ran)
    assert message in found
    assert hint in (mends or "")
    assert "Traceback" not in ran.stderr


def test_nothing_calibrated_yet(kvq: Kvq) -> None:
    ran = kvq("generate", *GIVEN)
    assert ran.code == 1
    assert "Hint: kvq calibrate" in ran.stderr


def test_the_first_of_several_sidecars_in_the_environment(
    kvq: Kvq, sidecar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(sidecar, tmp_path / "other"))
    monkeypatch.setenv("KVQ_SIDECAR", f"{other} {sidecar}")
    ran = kvq("generate", *GIVEN, *FEW, "--json")
    assert ran.json["sidecar"]["path"] == str(other)
    assert "KVQ_SIDECAR names 2 sidecars; this is the first" in notes(ran)


def test_a_sidecar_of_another_model_is_refused_before_weights_load(
    kvq: Kvq, current: Path, tiny_model_dir: Path, tmp_path: Path, no_weights: None
) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    ran = kvq("generate", other, *GIVEN, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "FingerprintMismatchError"
    assert error_of(ran)[1].startswith("kvq calibrate")


def test_another_model_of_the_same_shape_is_a_warning(
    kvq: Kvq, current: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    ran = kvq("generate", copy, *GIVEN, *FEW, "-q")
    assert ran.code == 0
    assert ran.stderr.startswith("Warning: this sidecar was calibrated for")


def interrupt_after(forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C be pressed in a forward pass of the model."""
    import kvq_runtime.models

    load = kvq_runtime.models.load_model

    def load_and_interrupt(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        count = 0

        def press(*_: object) -> None:
            nonlocal count
            count += 1
            if count > forwards:
                raise KeyboardInterrupt

        loaded.model.register_forward_pre_hook(press)
        return loaded

    monkeypatch.setattr("kvq_runtime.models.load_model", load_and_interrupt)


def test_ctrl_c_keeps_the_text(kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kvq("generate", *GIVEN, *FEW).stdout
    interrupt_after(7, monkeypatch)
    ran = kvq("generate", *GIVEN, *FEW)
    assert ran.code == 130
    text = ran.stdout.removesuffix("\n")
    assert text
    assert ran.stdout == text + "\n"
    assert whole.startswith(text.rstrip("\ufffd"))
    assert "7 generated" in ran.stderr
    assert "ended by: interrupted" in ran.stderr
    assert "tokens are held in" in ran.stderr
    assert "Error: interrupted" in ran.stderr
    assert "Next:" not in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_c_with_json_is_one_object(
    kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(7, monkeypatch)
    ran = kvq("generate", *GIVEN, *FEW, "--json")
    assert ran.code == 130
    assert ran.json["schema"] == "kvq.generate/1"
    assert ran.json["finish_reason"] == "interrupted"
    assert ran.json["generated_tokens"] == 7
    assert ran.json["text"]
    assert "Error: interrupted" in ran.stderr


@pytest.mark.parametrize("forwards", [0, 1])
def test_ctrl_c_while_the_prompt_is_read(
    kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch, forwards: int
) -> None:
    interrupt_after(forwards, monkeypatch)
    ran = kvq("generate", *GIVEN, *FEW, "--prefill-chunk", 4, "--json")
    assert ran.code == 130
    assert (ran.json["text"], ran.json["generated_tokens"]) == ("", 0)
    assert ran.json["tokens_held"] == 4 * forwards
    assert ran.json["wall_clock"]["decode_tokens_per_second"] is None


def test_ctrl_c_before_generation_is_an_error(
    kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvq_runtime.models.load_model", load)
    ran = kvq("generate", *GIVEN, "--json")
    assert ran.code == 130
    assert ran.json["error"]["type"] == "Interrupted"


def running(sidecar: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-c", "from kvq_cli.app import main; main()",
        "generate", "--sidecar", sidecar, "--temperature", 1, "--max-new-tokens", 900, *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_text_streams_into_a_pipe_and_stays_when_a_signal_comes(sidecar: Path) -> None:
    with running(sidecar, *GIVEN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        assert first
        # Of 900 tokens a few are there: the process is in the middle of its work.
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        said = process.stderr.read().decode()
        assert process.wait(timeout=60) == 130
    assert (first + rest).endswith(b"\n")
    assert "ended by: interrupted" in said
    assert "tokens are held in" in said
    assert said.endswith("Error: interrupted; nothing half-written is left behind.\n")
    assert "Traceback" not in said


def test_a_reader_that_leaves_ends_it_quietly(sidecar: Path) -> None:
    with running(sidecar, "-q", *GIVEN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_bars_are_gone_before_the_text_begins(
    kvq: Kvq, current: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Bars(io.StringIO):
        def __enter__(self) -> Bars:
            order.append("open")
            return self

        def __exit__(self, *_: object) -> None:
            order.append("closed")

        def stage(self, name: str, total: int) -> Any:
            from kvq_formats.progress import SilentProgress

            order.append(f"{name} {total}")
            return SilentProgress().stage(name, total)

    stream = Output.stream
    monkeypatch.setattr(Output, "progress", lambda *_: Bars())
    monkeypatch.setattr(
        Output, "stream", lambda self, text: (order.append("text"), stream(self, text))
    )
    tokens = kvq("generate", *GIVEN, *FEW, "--json").json["prompt_tokens"]
    order.clear()
    kvq("generate", *GIVEN, *FEW, "--prefill-chunk", 1)
    assert order[:4] == ["open", f"prefill {tokens}", "closed", "text"]


@pytest.mark.parametrize(
    ("variables", "arguments", "source"),
    [
        ({"KVQ_PROMPT": "from the environment"}, ("--prompt-file", "{file}"), "file"),
        ({"KVQ_PROMPT_FILE": "{file}"}, ("-p", "from the command line"), "option"),
        ({"KVQ_PREFILL_CHUNK": "64"}, ("--exact-prefill", *GIVEN), "option"),
        ({"KVQ_EXACT_PREFILL": "1"}, ("--prefill-chunk", "64", *GIVEN), "option"),
    ],
)
def test_the_command_line_overrules_the_environment(
    kvq: Kvq,
    current: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: tuple[str, ...],
    source: str,
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("a prompt in a file")
    for name, text in variables.items():
        monkeypatch.setenv(name, text.format(file=file))
    ran = kvq("generate", *(text.format(file=file) for text in arguments), *FEW, "--json")
    assert ran.code == 0
    assert ran.json["prompt_source"] == source
    exact = "--exact-prefill" in arguments
    assert ran.json["rule"] == ("exact-prefill" if exact else "runtime")


def test_a_prompt_that_is_no_text(kvq: Kvq, current: Path, no_weights: None) -> None:
    ran = kvq("generate", "-p", b"\xff\xfe".decode(errors="surrogateescape"), "--json")
    assert ran.code == 1
    assert "-p is not UTF-8 text" in error_of(ran)[0]
