"""4 and 8 bits through transformers' own configuration, with a stand-in for the library.

The real one runs where bitsandbytes is installed.
"""

from __future__ import annotations

import json
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import kvq
from kvq_formats.errors import ConfigError, ModelError
from kvq_runtime.models import load_model, resolve_model
from kvq_runtime.weight_quantization import (
    bitsandbytes_config,
    explain_quantization_error,
    install_hint,
    stored_quantization,
)
from tiny_models import make_tiny_llama

HAS_BITSANDBYTES = util.find_spec("bitsandbytes") is not None

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the environment answers as if bitsandbytes were there."""
    find_spec, version = util.find_spec, metadata.version
    monkeypatch.setattr(
        "kvq_runtime.weight_quantization.find_spec",
        lambda name: object() if name == "bitsandbytes" else find_spec(name),
    )
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.50.2" if name == "bitsandbytes" else version(name)
    )


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvq_runtime.weight_quantization.find_spec", lambda _: None)


def stored(tiny_model_dir: Path, folder: Path, quantization: dict[str, Any]) -> Path:
    copy = Path(shutil.copytree(tiny_model_dir, folder / "model"))
    file = copy / "config.json"
    changed = {**json.loads(file.read_text()), "quantization_config": quantization}
    file.write_text(json.dumps(changed))
    return copy


def asked_of_transformers(
    model: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """What ``from_pretrained`` is called with."""
    asked: dict[str, Any] = {}

    def from_pretrained(**arguments: Any) -> tuple[Any, dict[str, Any]]:
        asked.update(arguments)
        return torch.nn.Identity(), {}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(resolve_model(model), device_map="cpu", **options)
    return asked


@pytest.mark.usefixtures("installed")
def test_transformers_is_asked_for_nf4_with_bf16_arithmetic(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = asked_of_transformers(tiny_model_dir, monkeypatch, load_in="4bit")
    asked = given["quantization_config"]
    assert isinstance(asked, BitsAndBytesConfig)
    assert asked.load_in_4bit
    assert not asked.load_in_8bit
    assert asked.bnb_4bit_quant_type == "nf4"
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.usefixtures("installed")
def test_eight_bits(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked_of_transformers(tiny_model_dir, monkeypatch, load_in="8bit")
    assert given["quantization_config"].load_in_8bit
    assert not given["quantization_config"].load_in_4bit


@pytest.mark.parametrize("quantization", [None, AWQ, GPTQ, NF4])
def test_without_a_width_transformers_does_as_the_model_says(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    model = tiny_model_dir if quantization is None else stored(
        tiny_model_dir, tmp_path, quantization
    )  # fmt: skip
    assert "quantization_config" not in asked_of_transformers(model, monkeypatch)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_without_bitsandbytes(tiny_model_dir: Path, load_in: str) -> None:
    with pytest.raises(ConfigError, match=f"--load-in-{load_in} needs bitsandbytes") as caught:
        load_model(resolve_model(tiny_model_dir), load_in=load_in)
    assert caught.value.hint == "pip install bitsandbytes"


def test_a_width_that_there_is_not(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="load_in is '3bit'") as caught:
        kvq.calibrate(tiny_model_dir, load_in="3bit", num_samples=1, seq_len=8)
    assert caught.value.hint == "--load-in-4bit or --load-in-8bit"


@pytest.mark.parametrize(
    ("quantization", "method"), [(AWQ, "awq"), (GPTQ, "gptq"), (NF4, "bitsandbytes")]
)
def test_what_is_stored_quantized_is_not_quantized_again(
    tiny_model_dir: Path, tmp_path: Path, quantization: dict[str, Any], method: str
) -> None:
    resolved = resolve_model(stored(tiny_model_dir, tmp_path, quantization))
    assert stored_quantization(resolved.config) == method
    with pytest.raises(ConfigError, match=rf"stored quantized \({method}\)") as caught:
        bitsandbytes_config(resolved, "4bit")
    assert "leave --load-in-4bit out" in (caught.value.hint or "")


def test_a_plain_model_is_not_stored_quantized(tiny_model_dir: Path) -> None:
    assert stored_quantization(resolve_model(tiny_model_dir).config) is None


@pytest.mark.parametrize(
    ("quantization", "package"),
    [(AWQ, "gptqmodel"), (GPTQ, "optimum"), (NF4, "bitsandbytes")],
)
def test_a_package_for_stored_weights_that_is_missing(
    tiny_model_dir: Path, tmp_path: Path, quantization: dict[str, Any], package: str
) -> None:
    """transformers itself finds out: nothing here stands in for it."""
    if util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    resolved = resolve_model(stored(tiny_model_dir, tmp_path, quantization))
    with pytest.raises(ModelError, match="for which a package is missing") as caught:
        load_model(resolved, device_map="cpu")
    assert (caught.value.hint or "").startswith("pip install ")
    assert package in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Loading it requires optimum (`pip install optimum`)", "pip install optimum"),
        ("requires: `pip install -U bitsandbytes>=0.46.1`", "pip install -U bitsandbytes>=0.46.1"),
        ("(`pip install 'auto-round>=0.5'`)", "pip install 'auto-round>=0.5'"),
        ("No module named 'magic'", "install it into the environment of kvq"),
    ],
)
def test_install_hints(message: str, hint: str) -> None:
    assert install_hint(ImportError(message)) == hint


def test_other_errors_of_quantized_weights(tiny_model_dir: Path) -> None:
    resolved = resolve_model(tiny_model_dir)
    spread = ValueError("Some modules are dispatched on the CPU or the disk. Make sure you ...")
    for load_in, offered in (("4bit", "a smaller model"), ("8bit", "--load-in-4bit, or a smaller")):
        explained = explain_quantization_error(spread, resolved, load_in)
        assert isinstance(explained, ModelError)
        assert f"to be held in {load_in[0]} bits and do not fit" in explained.message
        assert (explained.hint or "").startswith(offered)
    other = explain_quantization_error(RuntimeError("No GPU.\nmore"), resolved, "8bit")
    assert other is not None
    assert other.message.endswith("cannot load them here: No GPU.")
    # Not ours to explain.
    assert explain_quantization_error(KeyError("x"), resolved, "8bit") is None
    assert explain_quantization_error(RuntimeError("No GPU."), resolved, None) is None


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
@pytest.mark.filterwarnings("ignore")
def test_the_real_one_calibrates_and_generates(
    tiny_model_dir: Path, tmp_path: Path, text_file: Path, load_in: str, sensitivity: str
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    # On the CPU bitsandbytes wants rows of whole blocks of 64.
    make_tiny_llama(intermediate_size=128).save_pretrained(folder)
    loaded = load_model(resolve_model(folder), device_map="cpu", load_in=load_in)
    held = {name: x.clone() for name, x in loaded.model.state_dict().items()}
    width = {"4bit": torch.uint8, "8bit": torch.int8}[load_in]
    assert held["model.layers.0.mlp.up_proj.weight"].dtype == width
    config = kvq.KVQConfig.create(key_bits=3, value_bits=3, sensitivity=sensitivity)
    text: dict[str, Any] = {"dataset": str(text_file), "num_samples": 2, "seq_len": 128}
    made = kvq.calibrate(loaded.model, tokenizer=loaded.tokenizer, config=config, **text)
    after = loaded.model.state_dict()
    assert after.keys() == held.keys()
    assert all(torch.equal(after[name], x) for name, x in held.items())
    # Weights are off by a few per cent, and so is what is measured.
    plain = kvq.calibrate(folder, config=config, **text)
    for layer, statistics in made.statistics.items():
        assert statistics.key_error == pytest.approx(plain.statistics[layer].key_error, rel=0.5)
    ids = torch.randint(3, 300, (1, 300), generator=torch.Generator().manual_seed(0))
    with kvq.attach(loaded.model, made):
        text_ids = loaded.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert text_ids.shape == (1, 303)
