"""``kvq doctor``: every check on models that are made for it; no weights are ever loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from command_line import Kvq
from families import FAMILIES
from kvq_calibration import memory as calibration_memory
from kvq_cli.checks import files
from kvq_cli.checks.check import Asked
from kvq_cli.checks.diagnosis import diagnose
from kvq_formats.config import KVQConfig
from kvq_formats.sidecar import Sidecar
from kvq_runtime import runtime_rule
from kvq_runtime.memory import plan_memory
from kvq_runtime.resolve import resolve_model

CHECKS = ("versions", "imports", "configuration", "weights", "tokenizer", "attention", "drift",
          "implementation", "kernel shape", "kernel trial", "memory", "calibration",
          "disk")  # fmt: skip


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may load any."""

    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", load_model)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load_model)


def let_available(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kvq_runtime.memory", "kvq_calibration.memory"):
        monkeypatch.setattr(f"{module}.available_bytes", lambda _: count)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the longest context that fits is found quickly."""
    let_available(2**29, monkeypatch)


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def configured(model_dir: Path, to: Path, model_type: str, **options: Any) -> Path:
    """A folder with another model's configuration, and weights and tokenizer that do not matter."""
    path = Path(shutil.copytree(model_dir, to / model_type))
    CONFIG_MAPPING[model_type](**options).save_pretrained(path)
    return path


def status(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in found["checks"]}


def message(found: dict[str, Any], name: str) -> str:
    (check,) = [check for check in found["checks"] if check["name"] == name]
    return str(check["message"])


def test_the_built_in_model(kvq: Kvq, embedded: Path) -> None:
    ran = kvq("doctor", "--bits", 3)
    assert ran.code == 0
    for name in CHECKS:
        assert f"\n {name} " in ran.stdout or f"\n{name} " in ran.stdout, name
    for what in (
        "2 layers: 2 quantized, all channels rotated",
        "0-1",
        "channels 0-15 rotated",
        "reference: torch on cpu",
        "not run: attention is plain torch on cpu",
        "--sensitivity none",
        "a token",
    ):
        assert what in ran.stdout
    assert kvq("doctor", "-q").stderr == ""
    first, *_, last = ran.stderr.splitlines()
    assert first == "Note: no MODEL is named: looking at the small built-in model"
    assert last == "Next: kvq calibrate --bits 3"


def test_what_was_given_is_given_on(kvq: Kvq, folder: Path) -> None:
    given = ("--key-bits", 2, "--value-bits", 4, "--dtype", "float16", "--device-map", "cpu")
    ran = kvq("doctor", folder, *given, "--outlier-fraction", 0.02)
    expected = (
        f"Next: kvq calibrate {folder} --key-bits 2 --value-bits 4 --dtype float16 "
        "--device-map cpu --outlier-fraction 0.02\n"
    )
    assert ran.stderr == expected


def test_json(kvq: Kvq, folder: Path) -> None:
    found = kvq("doctor", folder, "--json", "--context", "1k").json
    assert found["schema"] == "kvq.doctor/1"
    assert (found["ok"], found["failed"]) == (True, [])
    assert tuple(status(found)) == CHECKS
    assert {*status(found).values()} == {"pass", "note"}
    assert found["layers"] == [
        {
            "layers": [0, 1],
            "kind": "full_attention",
            "quantized": True,
            "rotary_channels": [0, 16],
            "rotary_dim": 16,
            "window": None,
            "special": [],
            "reason": None,
        }
    ]
    assert found["cache"]["tokens"] == found["room"]["context"] == 1024
    assert found["cache"]["bf16"] == found["room"]["bf16_cache_bytes"]
    assert (
        found["calibration"]["fisher"]["total_bytes"] > found["calibration"]["none"]["total_bytes"]
    )
    assert found["next"] == f"kvq calibrate {folder} --bits 4"


def test_bytes_are_those_of_a_sidecar_that_was_calibrated(
    sidecar: Path, tiny_model_dir: Path
) -> None:
    made = Sidecar.load(sidecar)
    asked = Asked(str(tiny_model_dir), None, False, made.config, context=1000)
    diagnosis = diagnose(asked, output_folder=sidecar.parent)
    model, cache = resolve_model(tiny_model_dir), diagnosis.cache
    assert cache is not None
    plan = plan_memory(model, made, context=1000, dtype="bfloat16")
    assert (cache.packed, cache.bf16) == (plan.cache, plan.bf16_cache)
    # A page of both kinds, base position and table entry, over its tokens.
    assert cache.packed_a_token * 256 == pytest.approx(
        plan_memory(model, made, context=256 * 41, dtype="bfloat16").cache
         - plan_memory(model, made, context=256 * 40, dtype="bfloat16").cache
    )  # fmt: skip
    written = sum(file.stat().st_size for file in sidecar.iterdir())
    assert abs(diagnosis.numbers["sidecar_bytes"] - written) < 0.05 * written


def test_layers_with_a_window_stay_as_they_are(
    kvq: Kvq, tiny_model_dir: Path, tmp_path: Path
) -> None:
    family = FAMILIES["gpt-oss"]
    config = family.make().config.to_dict()
    for name in ("model_type", "per_layer_config"):
        config.pop(name, None)
    config |= {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    path = configured(tiny_model_dir, tmp_path, "gpt_oss", **config)
    ran = kvq("doctor", path)
    assert ran.code == 0
    assert (
        "6 layers: 3 quantized, all channels rotated, 3 keep a sliding window of 64" in ran.stdout
    )
    assert "learned sinks, attends to 64 tokens: does not grow" in ran.stdout
    found = kvq("doctor", path, "--json", "--context", "1k").json
    sliding, full = found["layers"]
    assert (sliding["layers"], sliding["quantized"], sliding["window"]) == ([0, 2, 4], False, 64)
    assert (full["layers"], full["special"]) == ([1, 3, 5], ["learned sinks"])
    # Windows hold one token less than they attend to: keys and values, 2 heads of 16, bf16.
    assert found["cache"]["as_it_is"] == 3 * 63 * 2 * 2 * 16 * 2
    assert found["cache"]["bf16"] == found["room"]["bf16_cache_bytes"]


def test_windows_in_all_layers_limit_the_context(
    kvq: Kvq, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_hidden_layers": 2, "vocab_size": 320, "intermediate_size": 96}
    options = {**shape, **more, "sliding_window": 512, "max_position_embeddings": 4096}
    path = configured(tiny_model_dir, tmp_path, "mistral", **options)
    found = kvq("doctor", path, "--json").json
    assert found["cache"]["tokens"] == found["room"]["largest_context"] == 512
    assert "for texts of up to 512 tokens" in message(found, "attention")
    ran = kvq("doctor", path, "--json", "--context", "1k")
    assert ran.code == 3
    assert ran.json["failed"] == ["context"]


def test_layers_without_rope_are_fine(kvq: Kvq, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = FAMILIES["SmolLM3"].make().config.to_dict()
    config.pop("model_type")
    found = kvq("doctor", configured(tiny_model_dir, tmp_path, "smollm3", **config), "--json").json
    assert found["ok"]
    assert [group["rotary_channels"] for group in found["layers"]] == [[0, 16], [0, 0]]
    assert "1 of them without RoPE" in message(found, "attention")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("bamba", "nothing to quantize"),
        ("bart", "is an encoder-decoder"),
        ("mamba", "has no num_attention_heads"),
    ],
)
def test_what_is_not_supported_fails_one_check(
    kvq: Kvq, tiny_model_dir: Path, tmp_path: Path, model_type: str, reason: str
) -> None:
    path = configured(tiny_model_dir, tmp_path, model_type)
    ran = kvq("doctor", path, "--json")
    assert ran.code == 3
    assert ran.json["failed"] == ["attention"]
    assert reason in message(ran.json, "attention")
    assert status(ran.json)["weights"] == status(ran.json)["tokenizer"] == "pass"
    assert (ran.json["layers"], ran.json["cache"], ran.json["next"]) == ([], None, None)
    assert "Error: 1 of 7 checks failed: attention." in ran.stderr


def test_a_type_that_transformers_does_not_know_fails_too(kvq: Kvq, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    ran = kvq("doctor", folder, "--json")
    assert ran.code == 3
    assert ran.json["failed"] == ["configuration"]
    assert "does not know the model type" in message(ran.json, "configuration")


@pytest.mark.parametrize(
    ("name", "failed", "reason"),
    [
        ("model.safetensors", "weights", "it has no weights (model.safetensors)"),
        ("tokenizer.json", "tokenizer", "has no tokenizer"),
    ],
)
def test_a_file_that_is_missing(
    kvq: Kvq, folder: Path, name: str, failed: str, reason: str
) -> None:
    (folder / name).unlink()
    (folder / "tokenizer_config.json").unlink()
    if name != "tokenizer.json":
        shutil.copy(folder / "tokenizer.json", folder / "tokenizer.model")
    ran = kvq("doctor", folder, "--json")
    assert ran.code == 3
    assert failed in ran.json["failed"]
    assert reason in message(ran.json, failed)
    # What does not depend on it is looked at all the same.
    assert status(ran.json)["attention"] == "pass"
    assert ran.json["cache"]["bf16_a_token"] == 2 * 2 * 2 * 16 * 2
    assert ran.json["room"]["weights_bytes"] > 300_000


def test_sizes_that_only_weights_tell(kvq: Kvq, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    found = kvq("doctor", folder, "--json").json
    assert "not compared" in message(found, "memory")
    assert "room" not in found
    assert "room" in kvq("doctor", folder, "--json", "--dtype", "bfloat16").json


def test_weights_that_are_cut_short(kvq: Kvq, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    ran = kvq("doctor", folder, "--json")
    assert ran.code == 3
    assert f"{file} is damaged" in message(ran.json, "weights")
    assert "Error: 1 of" in ran.stderr
    assert "copy or download the file again" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("./nowhere",), 1, "there is no folder"),
        (("org/not-in-the-cache",), 1, "HF_HUB_OFFLINE"),
        (("--bits", "5"), 2, "--bits is 5"),
        (("--context", "0"), 2, "--context is '0'"),
        (("--device-map", "gpu"), 2, "is no device"),
    ],
)
def test_what_could_not_be_looked_at(
    kvq: Kvq, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    ran = kvq("doctor", *arguments, "--json")
    assert ran.code == code
    assert reason in ran.json["error"]["message"]


def test_a_configuration_that_cannot_be_read_is_an_error(kvq: Kvq, folder: Path) -> None:
    (folder / "config.json").write_text("{")
    ran = kvq("doctor", folder, "--json")
    assert ran.code == 1
    assert "cannot be read" in ran.json["error"]["message"]


def test_a_layer_that_drifts_is_named_by_doctor_and_by_calibrate(
    kvq: Kvq, folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if kvq did not honour the scale of a family's scores."""
    honoured = runtime_rule.attention_options

    def wrong(options: Any, **sizes: Any) -> Any:
        found = honoured(options, **sizes)
        return type(found)(**{**vars(found), "scaling": 1.5 * found.scaling})

    monkeypatch.setattr(runtime_rule, "attention_options", wrong)
    ran = kvq("doctor", folder, "--json")
    assert ran.code == 3
    assert ran.json["failed"] == ["attention"]
    reason = message(ran.json, "attention")
    assert f"{folder} does not do in layer 0 what kvq makes of it" in reason
    refused = kvq("calibrate", folder, "-o", tmp_path / "q", "--dataset", text_file, "--json")
    assert refused.code == 1
    assert refused.json["error"]["message"] == reason


def test_too_little_memory(kvq: Kvq, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_available(100_000, monkeypatch)
    ran = kvq("doctor", folder, "--json")
    assert ran.code == 3
    assert ran.json["failed"] == ["memory", "calibration"]
    needed = calibration_memory.plan_calibration_memory(
        resolve_model(folder), KVQConfig(sensitivity="none"), num_samples=16, seq_len=1024
    )
    let_available(needed.total, monkeypatch)
    ran = kvq("doctor", folder)
    assert "calibration" in ran.stderr
    assert "Hint: kvq calibrate --sensitivity none, or a shorter --seq-len" in ran.stdout
    let_available(10**10, monkeypatch)
    ran = kvq("doctor", folder, "--context", "1000M", "--json")
    assert ran.json["failed"] == ["memory"]
    assert "the largest context that fits is" in message(ran.json, "memory")
    assert status(ran.json)["context"] == "note"


def test_too_little_disk(kvq: Kvq, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    ran = kvq("doctor", folder, "--json")
    assert ran.json["failed"] == ["disk"]


# The cache of the Hub.


@pytest.fixture
def cached(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of org/model, as a download would leave it."""
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = Path(shutil.copytree(tiny_model_dir, repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE",
                 "huggingface_hub.file_download.HF_HUB_CACHE",
                 "transformers.utils.hub.HF_HUB_CACHE"):  # fmt: skip
        monkeypatch.setattr(name, str(tmp_path / "hub"), raising=False)
    return snapshot


def test_a_model_in_the_cache(kvq: Kvq, cached: Path) -> None:
    found = kvq("doctor", "org/model", "--json").json
    assert found["ok"]
    assert found["base_model"]["revision"] == "a" * 40
    assert "1 file in the cache" in message(found, "weights")


def test_weights_that_are_not_in_the_cache(
    kvq: Kvq, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cached / "model.safetensors").unlink()
    ran = kvq("doctor", "org/model", "--json")
    assert ran.code == 3
    assert ran.json["failed"] == ["weights"]
    assert "HF_HUB_OFFLINE" in message(ran.json, "weights")
    # With a network they are downloaded; the Hub tells how much that is.
    listed = ["config.json", "model.safetensors", "consolidated.safetensors", "tokenizer.json"]
    sizes = [SimpleNamespace(rfilename=name, size=3 * 2**30) for name in listed]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("kvq_runtime.resolve.is_reachable", lambda: True)
    monkeypatch.setattr("kvq_runtime.resolve.repository_files", lambda *_, **__: {*listed})
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=sizes)
    )
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained",
        lambda *_, **__: CONFIG_MAPPING["llama"].from_pretrained(cached),
    )
    found = kvq("doctor", "org/model", "--json").json
    assert "not in the cache" in message(found, "weights")
    assert found["download_bytes"] == 3 * 2**30
    assert "3.0 GiB of weights" in message(found, "download")
    monkeypatch.setattr(files, "free_bytes", lambda _: 2**30)
    assert kvq("doctor", "org/model", "--json").json["failed"] == ["download"]
