from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig

from kvq_formats.errors import ConfigError, ModelError, UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint
from kvq_runtime import resolve
from kvq_runtime.resolve import resolve_model


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder(tiny_model_dir: Path) -> None:
    resolved = resolve_model(tiny_model_dir)
    assert resolved.is_local
    assert resolved.record.id == str(tiny_model_dir)
    assert resolved.record.revision is None
    assert resolved.record.name == "tiny-llama"
    fingerprint = resolved.record.fingerprint
    assert fingerprint.summary == "2 layers, 2 KV heads, head_dim 16"
    assert fingerprint == Fingerprint.from_config(resolved.config.to_dict())
    assert resolved.max_positions == 1024
    assert resolved.notes == ()


def test_a_folder_is_recorded_so_that_it_is_found_from_anywhere(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_dir)
    assert resolve_model(".").record.id == str(tiny_model_dir)
    monkeypatch.chdir(tiny_model_dir.parent)
    for name in ("tiny-llama", "./tiny-llama/", "tiny-llama/../tiny-llama"):
        assert resolve_model(name).record.id == str(tiny_model_dir)


def test_the_caller_may_name_the_record(tiny_model_dir: Path) -> None:
    resolved = resolve_model(tiny_model_dir, record_id="kvq/tiny-llama")
    assert resolved.record.id == "kvq/tiny-llama"
    assert resolved.location == str(tiny_model_dir)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "two words", "", " "])
def test_neither_a_folder_nor_an_id(name: str) -> None:
    with pytest.raises(ModelError, match="there is no folder") as caught:
        resolve_model(name)
    assert "org/name" in (caught.value.hint or "")


def test_a_file(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="is a file; expected a folder") as caught:
        resolve_model(tiny_model_dir / "model.safetensors")
    assert str(tiny_model_dir) in (caught.value.hint or "")


def test_revisions_that_make_no_sense(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder and has no revision"):
        resolve_model(tiny_model_dir, revision="main")
    with pytest.raises(ConfigError, match="two revisions"):
        resolve_model("org/name@v1", revision="v2")


def test_original_weights_are_answered_with_the_twin_before_any_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolve, "is_reachable", None)
    with pytest.raises(ModelError, match="not transformers weights") as caught:
        resolve_model("meta-llama/Llama-2-7b")
    assert caught.value.hint == "use meta-llama/Llama-2-7b-hf"


def test_a_folder_that_lacks_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")
    with pytest.raises(ModelError, match=r"format of its authors \(consolidated\.00\.pth\)"):
        resolve_model(folder)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(ModelError, match="no weights"):
        resolve_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(folder)


def test_truncated_weights_are_found_before_they_are_loaded(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        resolve_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid JSON file"),
        # transformers 5.17 trips over a list before it looks for model_type.
        ("[]", "model_type|list indices"),
        ("{}", "model_type"),
        ('{"model_type": "llama", "hidden_size": "big"}', "expected int, got str"),
        ('{"model_type": "llama", "num_attention_heads": 3}', "multiple of the number of"),
    ],
)
def test_a_config_that_cannot_be_read(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(folder)
    assert "config.json" in (caught.value.hint or "")


def test_a_type_that_transformers_does_not_know(folder: Path) -> None:
    change_config(folder, model_type="not_yet")
    expected = f"transformers {transformers.__version__} does not know the model type not_yet"
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        resolve_model(folder)
    assert "pip install --upgrade" in (caught.value.hint or "")


def test_code_in_the_repository_is_never_run_unasked(folder: Path) -> None:
    trap = folder / "ran"
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(ModelError, match="brings its own code") as caught:
        resolve_model(folder)
    assert "--trust-remote-code" in (caught.value.hint or "")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "MLA"),
        ({"model_type": "mistral", "sliding_window": 128}, "nothing to quantize"),
    ],
)
def test_unsupported_models_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **{"architectures": None, "head_dim": None, **changes})
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(folder)


def test_layers_that_are_left_out_are_noted(folder: Path) -> None:
    change_config(
        folder,
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=128,
    )
    (note,) = resolve_model(folder).notes
    assert note.startswith("1 of 2 layers")


def test_without_network_the_cache_must_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def read(location: str, **options: Any) -> Any:
        asked.update(options, location=location)
        raise OSError("We couldn't connect") from LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    monkeypatch.setattr(resolve, "is_reachable", lambda: False)
    with pytest.raises(ModelError, match="does not hold org/name") as caught:
        resolve_model("org/name@v1")
    assert (asked["location"], asked["revision"]) == ("org/name", "v1")
    assert asked["local_files_only"] is True
    assert asked["trust_remote_code"] is False
    assert "hf download org/name" in (caught.value.hint or "")
