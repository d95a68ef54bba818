from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvq_formats.errors import ConfigError, ModelError
from kvq_formats.fingerprint import Fingerprint
from kvq_runtime.models import load_model, load_tokenizer, resolve_model
from tiny_models import make_tiny_family


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_loads_model_and_tokenizer(tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolved = resolve_model(tiny_model_dir)
    loaded = load_model(resolved, device_map="cpu")
    assert loaded.record == resolved.record
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer("the").input_ids[0] == 0
    assert loaded.notes == ()
    # What the weights' configuration says is what was checked before they were read.
    config = loaded.model.config.get_text_config(decoder=True).to_dict()
    assert Fingerprint.from_config(config) == resolved.record.fingerprint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_dtypes(tiny_model_dir: Path, dtype: str, expected: torch.dtype) -> None:
    loaded = load_model(resolve_model(tiny_model_dir), dtype=dtype, device_map="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}


def test_auto_dtype_is_that_of_the_weights(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    loaded = load_model(resolve_model(folder), device_map="cpu")
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementations(tiny_model_dir: Path, name: str) -> None:
    loaded = load_model(resolve_model(tiny_model_dir), device_map="cpu", attn_implementation=name)
    assert loaded.model.config._attn_implementation == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device_map": "toaster"}, "device_map 'toaster' is no device"),
        ({"attn_implementation": "magic"}, "attn_implementation 'magic' cannot be used"),
    ],
)
def test_options_that_make_no_sense(
    tiny_model_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(resolve_model(tiny_model_dir), **options)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_a_gpu_that_is_not_there(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="has 0 GPUs") as caught:
        load_model(resolve_model(tiny_model_dir), device_map="cuda:1")
    assert "--device-map cpu" in (caught.value.hint or "")


def test_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(resolve_model(folder))


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be read"):
        load_tokenizer(resolve_model(folder))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_weights_that_would_be_made_up_are_refused(folder: Path) -> None:
    """transformers fills missing tensors with random numbers and goes on."""
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lack 9 tensors .* such as model\.layers\.2\."):
        load_model(resolve_model(folder))


def test_one_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*layers\.1\.self_attn\.k_proj"):
        load_model(resolve_model(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=128)
    with pytest.raises(ModelError, match=r"do not fit .*mlp.* is \[.*\], expected \[.*\]"):
        load_model(resolve_model(folder))


def test_weights_damaged_after_they_were_checked(folder: Path) -> None:
    resolved = resolve_model(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_model(resolved)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory", "--dtype bfloat16"),
        (MemoryError(), "out of memory", "a smaller model"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            "out of memory",
            "--device-map auto",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full", "HF_HOME"),
        (ImportError("Using `gptq` needs `optimum`"), "package that is not installed", "install"),
    ],
)
def test_failures_while_weights_load(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
    hint: str,
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(resolve_model(tiny_model_dir))
    assert hint in (caught.value.hint or "")


def test_unknown_failures_keep_their_traceback(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        load_model(resolve_model(tiny_model_dir))


ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}
"""As ``auto`` spreads a model that is too large for GPUs and host."""


def test_layers_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvq_runtime.models.target_device", lambda _: ON_DISK)
    loaded = load_model(resolve_model(folder), device_map="auto")
    assert loaded.model.model.layers[1].mlp.up_proj.weight.is_meta
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = loaded.model(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.equal(found, expected)


def test_experts_that_would_be_written_anew_for_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_tiny_family("mixtral", num_local_experts=4, num_experts_per_tok=2)
    experts.save_pretrained(folder)
    monkeypatch.setattr("kvq_runtime.models.target_device", lambda _: ON_DISK)
    with pytest.raises(ModelError, match="would have to be written anew") as caught:
        load_model(resolve_model(folder), device_map="auto")
    assert "--load-in-4bit" in (caught.value.hint or "")
