from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command_line import Kvq
from kvq_cli.output import Output
from kvq_cli.session import cache_folder, remember
from kvq_formats.config import PAGE_TOKENS
from local_tasks import choice_task

FEW = ("--limit", 2, "--seq-len", 64)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_current_sidecar_on_the_default_text(kvq: Kvq, sidecar: Path) -> None:
    remember(sidecar, Output())
    ran = kvq("eval", *FEW)
    assert ran.code == 0
    header = next(line for line in ran.stdout.splitlines() if "ppl" in line)
    assert header.split() == [
        "cache",
        "bits",
        "eff",
        "ppl",
        "Δ",
        "KL",
        "KL",
        "p99",
        "agree",
        "path",
    ]
    first, second = (
        next(line for line in ran.stdout.splitlines() if line.startswith(f" {name}"))
        for name in ("unquantized", sidecar.name)
    )
    assert "±" in first
    assert "100.00 %" in first
    assert first.rstrip().endswith("prefill")
    assert second.count("±") == 3
    assert "partial: 2 windows of" in ran.stdout
    assert f"using the current sidecar, {sidecar}" in ran.stderr
    assert "bundled text" in ran.stderr
    assert "no standard error" not in ran.stderr
    assert ran.stderr.splitlines()[-1] == f"Next: kvq generate --sidecar {sidecar}"


def test_json_and_raw_results(
    kvq: Kvq, sidecar: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / sidecar.name
    other.mkdir()
    (other / "kvq.safetensors").write_bytes((sidecar / "kvq.safetensors").read_bytes())
    ran = kvq(
        "eval", tiny_model_dir, "--sidecar", sidecar, "--sidecar", other, "--json",
        "--ppl", f"{text_file},c4", "-o", "results.json", *FEW,
    )  # fmt: skip
    assert ran.code == 0
    found = ran.json
    assert found["schema"] == "kvq.eval/1"
    assert found["results"] == "results.json"
    assert len(found["texts"]) == 2
    assert found["texts"][0]["dataset"] == text_file.name
    for text in found["texts"]:
        unquantized, one, two = text["rows"]
        assert text["partial"].startswith("2 of ")
        assert text["partial"].endswith(" windows")
        assert (unquantized["name"], unquantized["kl"]) == ("unquantized", 0)
        # Two sidecars of one name are told apart by their paths; the same bytes cost the same.
        assert (one["name"], two["name"]) == (str(sidecar), str(other))
        assert one["kl"] == two["kl"] > 0
        assert one["path"] == "prefill"
        assert "per_window" not in one
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["schema"] == "kvq.eval/1"
    assert len(raw["texts"][0]["rows"][1]["per_window"]["nll"]) == 2


def test_the_decode_path(kvq: Kvq, sidecar: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("eval", "--sidecar", sidecar, "--ppl", text_file, "--limit", 1)
    arguments = (*arguments, "--seq-len", 2 * PAGE_TOKENS, "--path", "decode")
    ran = kvq(*arguments, "--max-kl", 1e-12, "--json", "-o", "r.json")
    # The bar is held against the decoded row, and missed.
    assert ran.code == 3
    (text,) = ran.json["texts"]
    unquantized, quantized = text["rows"]
    assert (ran.json["path"], unquantized["path"], quantized["path"]) == (
        "decode",
        "prefill",
        "decode",
    )
    assert text["partial"].startswith("1 of ")
    assert quantized["kl"] > 0
    assert unquantized["tokens"] == quantized["tokens"] == 2 * PAGE_TOKENS - 1
    assert "reads nothing from codes" not in ran.stderr
    raw = json.loads((tmp_path / "r.json").read_text())
    assert raw["path"] == "decode"
    assert raw["texts"][0]["rows"][1]["path"] == "decode"
    prefill = kvq(*arguments[:-2], "--json").json
    other = prefill["texts"][0]["rows"][1]
    assert (prefill["path"], other["path"]) == ("prefill", "prefill")
    assert other["effective_bits"] == quantized["effective_bits"]
    # The query's own page is exact on the decode path only.
    assert other["kl"] > quantized["kl"]


def test_decoding_less_than_a_page_is_said_to_measure_nothing(
    kvq: Kvq, sidecar: Path, text_file: Path
) -> None:
    ran = kvq("eval", "--sidecar", sidecar, "--ppl", text_file, "--path", "decode", *FEW)
    assert ran.code == 0
    assert (
        f"Warning: {sidecar.name}: decoding reads nothing from codes in windows of 64 tokens"
        in ran.stderr
    )
    assert "--seq-len" in ran.stderr


def test_results_are_kept_in_the_cache_without_a_file(
    kvq: Kvq, sidecar: Path, text_file: Path
) -> None:
    arguments = ("eval", "--sidecar", sidecar, "--ppl", text_file, *FEW)
    assert kvq(*arguments).code == 0
    assert kvq(*arguments).code == 0
    saved = sorted((cache_folder() / "results").iterdir())
    assert len(saved) == 2
    assert json.loads(saved[0].read_text())["texts"]


def test_results_are_saved_before_anything_is_drawn(
    kvq: Kvq, sidecar: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no table")

    monkeypatch.setattr("kvq_cli.measurement.tables", broken)
    ran = kvq("eval", "--sidecar", sidecar, "--ppl", text_file, "-o", "r.json", *FEW)
    assert ran.code == 1
    assert json.loads((tmp_path / "r.json").read_text())["texts"]


def test_the_environment_may_name_several_sidecars(
    kvq: Kvq, sidecar: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(sidecar, tmp_path / "other"))
    monkeypatch.setenv("KVQ_SIDECAR", f"{sidecar} {other}")
    found = kvq("eval", "--ppl", text_file, "--json", *FEW).json
    assert [row["name"] for row in found["texts"][0]["rows"][1:]] == [sidecar.name, "other"]


def test_gates(kvq: Kvq, sidecar: Path, text_file: Path) -> None:
    arguments = ("eval", "--sidecar", sidecar, "--ppl", text_file, *FEW)
    passed = kvq(*arguments, "--max-kl", 100, "--max-ppl-increase", 1e9, "--json")
    assert passed.code == 0
    assert [gate["passed"] for gate in passed.json["gates"]] == [True, True]
    missed = kvq(*arguments, "--max-kl", 1e-12, "--max-ppl-increase", 1e9, "--json")
    assert missed.code == 3
    # One object only: the result; what was missed is in it, and said on stderr.
    gates = {gate["metric"]: gate["passed"] for gate in missed.json["gates"]}
    assert gates == {"perplexity_increase": True, "kl": False}
    assert "kl is" in missed.stderr
    plain = kvq(*arguments, "--max-kl", 1e-12)
    assert plain.code == 3
    assert "unquantized" in plain.stdout
    assert f"Error: {sidecar.name} on {text_file.name}, prefill: kl is" in plain.stderr
    assert "Next:" not in plain.stderr


def test_gates_of_two_paths_are_told_apart(kvq: Kvq, sidecar: Path, text_file: Path) -> None:
    given = ("eval", "--sidecar", sidecar, "--ppl", text_file, "--limit", 1, "--seq-len", 300)
    ran = kvq(*given, "--path", "both", "--max-kl", 1e-12, "--json")
    assert ran.code == 3
    assert [gate["path"] for gate in ran.json["gates"]] == ["prefill", "decode"]
    assert f"{sidecar.name} on {text_file.name}, decode: kl is" in ran.stderr


def test_gates_that_nothing_could_miss_are_refused(
    kvq: Kvq, sidecar: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", no_weights)
    ran = kvq("eval", "--sidecar", sidecar, "--retrieval", "passkey", "--max-kl", 1)
    assert ran.code == 2
    assert "Error: --max-kl: there is no text to measure it on" in ran.stderr
    assert "Hint: --ppl wikitext2" in ran.stderr
    bars = ("--max-kl", 1, "--max-ppl-increase", 1)
    ran = kvq("eval", tiny_model_dir, "--baseline", "int4", *bars, *FEW, "--json")
    assert ran.code == 2
    assert ran.json["error"]["message"].startswith(
        "--max-ppl-increase and --max-kl: there is no sidecar to hold to it"
    )
    assert ran.json["error"]["hint"] == "--sidecar DIR"


def test_sidecars_of_several_seeds(
    kvq: Kvq, embedded: Path, text_file: Path, tmp_path: Path
) -> None:
    names = [f"q-s{seed}" for seed in (0, 1)]
    for seed, name in enumerate(names):
        small = ("--num-samples", 2, "--seq-len", 128, "--seed", seed)
        assert kvq("calibrate", "--dataset", text_file, "-o", name, *small).code == 0
    given = [word for name in names for word in ("--sidecar", name)]
    ran = kvq("eval", *given, "--ppl", text_file, "--max-kl", 1e9, "-o", "r.json", "--json", *FEW)
    assert ran.code == 0
    for found in (ran.json, json.loads((tmp_path / "r.json").read_text())):
        (text,) = found["texts"]
        assert [row["name"] for row in text["rows"][1:]] == [*names, "q over 2 seeds"]
        assert text["rows"][-1]["seeds"] == [0, 1]
        assert [gate["name"] for gate in found["gates"]] == names
    assert embedded.is_dir()


def test_a_sidecar_of_another_model_is_refused_before_weights_load(
    kvq: Kvq, sidecar: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))

    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", no_weights)
    ran = kvq("eval", other, "--sidecar", sidecar, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "FingerprintMismatchError"
    assert "3 layers" in ran.json["error"]["message"]
    assert ran.json["error"]["hint"].startswith("kvq calibrate")


def test_another_model_of_the_same_shape_is_a_warning(
    kvq: Kvq, sidecar: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    ran = kvq("eval", copy, "--sidecar", sidecar, "--ppl", text_file, "-q", *FEW)
    assert ran.code == 0
    assert ran.stderr.startswith("Warning: this sidecar was calibrated for")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--ppl", ","), 2, "--ppl names no text"),
        (("--ppl", "./nowhere.txt"), 1, "nowhere.txt"),
        (("-o", "."), 1, "is a folder"),
        (("--sidecar", "nowhere"), 1, "nowhere"),
        (("--limit", 0), 2, "--limit"),
        (("--path", "generate"), 2, "'generate' is not one of 'prefill', 'decode'"),
        (("--max-kl", "nan"), 2, "--max-kl is nan"),
        (("--max-ppl-increase", "inf"), 2, "--max-ppl-increase is inf"),
        (("--max-kl", -1), 2, "--max-kl is -1"),
    ],
)
def test_bad_options(
    kvq: Kvq, sidecar: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    remember(sidecar, Output())
    ran = kvq("eval", *options, "--json")
    assert ran.code == code
    assert message in ran.json["error"]["message"]


def test_results_replace_results_only(
    kvq: Kvq, sidecar: Path, text_file: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("a text of mine")
    arguments = ("eval", "--sidecar", sidecar, "--ppl", text_file, *FEW, "--json")
    for file in (mine, sidecar / "kvq.safetensors", sidecar / "kvq_config.json"):
        before = file.read_bytes()
        ran = kvq(*arguments, "-o", file)
        assert ran.code == 1
        assert "holds something else" in ran.json["error"]["message"]
        assert file.read_bytes() == before
    assert kvq(*arguments, "-o", "r.json").code == 0
    assert kvq(*arguments, "-o", "r.json").code == 0


def test_results_that_cannot_be_kept_stop_before_the_work(
    kvq: Kvq, sidecar: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", no_weights)
    monkeypatch.setenv("KVQ_CACHE", str(text_file))
    ran = kvq("eval", "--sidecar", sidecar, "--ppl", text_file, *FEW, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "OutputError"


def test_nothing_calibrated_yet(kvq: Kvq) -> None:
    ran = kvq("eval")
    assert ran.code == 1
    assert "Hint: kvq calibrate" in ran.stderr


def test_windows_are_clamped_to_the_models_positions(
    kvq: Kvq, sidecar: Path, text_file: Path
) -> None:
    arguments = ("eval", "--sidecar", sidecar, "--ppl", text_file, "--limit", 1, "--json")
    given = kvq(*arguments, "--seq-len", 5000)
    assert "Note: --seq-len 5000 is clamped to the model's 1024 positions" in given.stderr
    assert given.json["texts"][0]["rows"][0]["tokens"] == 1023
    assert f"Note: {text_file.name} gives one window: no standard error\n" in given.stderr
    # One window has no standard error: null, not a number that was made up.
    assert given.json["texts"][0]["rows"][0]["perplexity_stderr"] is None


def test_the_embedded_models_sidecar_needs_no_model(
    kvq: Kvq, embedded: Path, text_file: Path
) -> None:
    small = ("--num-samples", 2, "--seq-len", 128)
    assert kvq("calibrate", "--dataset", text_file, "-o", "q", *small).code == 0
    ran = kvq("eval", "--ppl", text_file, "--json", *FEW)
    assert ran.code == 0
    assert ran.json["base_model"]["id"] == "kvq/tiny-llama"


def test_baselines_stand_beside_sidecars_on_both_paths(kvq: Kvq, sidecar: Path) -> None:
    ran = kvq("eval", "--sidecar", sidecar, "--baseline", "kivi2-g16,fp8", "--path", "both", *FEW,
              "--json")  # fmt: skip
    assert ran.code == 0
    rows = ran.json["texts"][0]["rows"]
    expected = [("unquantized", "prefill")]
    for path in ("prefill", "decode"):
        expected += [(name, path) for name in (sidecar.name, "kivi2-g16", "fp8")]
    assert [(row["name"], row["path"]) for row in rows] == expected
    by = {(row["name"], row["path"]): row for row in rows}
    # 8 bits, and the share of one sink at 16.
    tokens = by["fp8", "prefill"]["effective_bits"]
    assert 8 < tokens < 8.2
    for name in (sidecar.name, "kivi2-g16", "fp8"):
        # A query's own page is exact when decoding.
        assert by[name, "decode"]["kl"] < by[name, "prefill"]["kl"]
        assert by[name, "prefill"]["kl_median"] <= by[name, "prefill"]["kl_p99"]
        assert set(by[name, "prefill"]["attention_error"]) == {"0", "1"}
    assert set(ran.json["baselines"]) == {"kivi2-g16", "fp8"}


def test_baselines_alone_need_a_model(kvq: Kvq, tiny_model_dir: Path) -> None:
    ran = kvq("eval", tiny_model_dir, "--baseline", "hadamard4", *FEW, "--json")
    assert ran.code == 0
    assert [row["name"] for row in ran.json["texts"][0]["rows"]] == ["unquantized", "hadamard4"]
    assert ran.json["sidecars"] == {}
    assert kvq("eval", "--baseline", "hadamard4", *FEW).code == 1


def test_a_baseline_that_is_none_is_said_before_anything_is_loaded(kvq: Kvq, sidecar: Path) -> None:
    ran = kvq("eval", "--sidecar", sidecar, "--baseline", "kivy2", *FEW)
    assert ran.code == 2
    assert "Did you mean kivi?" in ran.stderr


def test_gates_are_for_sidecars_alone(kvq: Kvq, sidecar: Path) -> None:
    given = ("eval", "--sidecar", sidecar, "--baseline", "hadamard2", *FEW, "--json")
    rows = {row["name"]: row["kl"] for row in kvq(*given).json["texts"][0]["rows"]}
    ran = kvq(*given, "--max-kl", 1.01 * rows[sidecar.name])
    assert ran.code == 0
    assert [gate["name"] for gate in ran.json["gates"]] == [sidecar.name]


def test_tasks_of_a_folder(kvq: Kvq, sidecar: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason='tasks need lm_eval: pip install "kvq[eval]"')
    choice_task(tmp_path, documents=3)
    given = ("eval", "--sidecar", sidecar, "--tasks", "own_choice", "--tasks-path", tmp_path)
    ran = kvq(*given, "--limit", 2, "--json")
    assert ran.code == 0
    assert ran.json["texts"] == []
    assert [row["name"] for row in ran.json["tasks"]] == ["unquantized", sidecar.name]
    assert {row["samples"] for row in ran.json["tasks"]} == {2}
    assert "own_choice" in kvq(*given).stdout


def test_baselines_are_not_run_on_tasks(
    kvq: Kvq, sidecar: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason='tasks need lm_eval: pip install "kvq[eval]"')
    choice_task(tmp_path, documents=2)
    given = ("eval", "--sidecar", sidecar, "--tasks", "own_choice", "--tasks-path", tmp_path)
    given = (*given, "--baseline", "fp8,int4", "--json")
    beside = kvq(*given, "--ppl", text_file, *FEW)
    assert "Note: baselines (fp8, int4) are not run on tasks" in beside.stderr
    assert set(beside.json["baselines"]) == {"fp8", "int4"}

    def no_samples(*_: object, **__: object) -> None:
        pytest.fail("a baseline was calibrated")

    monkeypatch.setattr("kvq_evaluation.samples.collect_samples", no_samples)
    alone = kvq(*given)
    assert alone.code == 0
    assert "Note: baselines (fp8, int4) are left out: tasks are run without them" in alone.stderr
    assert alone.json["baselines"] == {}
    refused = kvq(*given, "--max-ppl-increase", 1)
    assert refused.code == 2
    assert "no text to measure it on" in refused.json["error"]["message"]


def test_options_of_tasks_without_tasks(kvq: Kvq, sidecar: Path) -> None:
    ran = kvq("eval", "--sidecar", sidecar, "--num-fewshot", 3, *FEW)
    assert ran.code == 2
    assert "--tasks" in ran.stderr
