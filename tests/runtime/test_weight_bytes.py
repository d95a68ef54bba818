"""Weights counted before they are there, against weights that are."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvq_formats.errors import ConfigError
from kvq_runtime.models import load_model, resolve_model
from kvq_runtime.weight_bytes import tensor_bytes, weight_bytes, weights_dtype
from large_models import LLAMA_3_8B_PARAMETERS, described, llama_3_8b
from tiny_models import make_tiny_family, make_tiny_llama

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mixtral", MIXTRAL)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_as_they_are_loaded(
    family: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make_tiny_family(family, **options)
    # The rotary frequencies stay in fp32.
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    parameters = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    assert weight_bytes(described(model.config), dtype=dtype) == parameters + buffers


def test_eight_billion_weights() -> None:
    model, kind = llama_3_8b(), torch.bfloat16
    frequencies = 2 * 64 * 4
    assert weights_dtype(model, "auto") == kind
    assert weight_bytes(model, dtype=kind) == 2 * LLAMA_3_8B_PARAMETERS + frequencies
    # Embeddings and output layer of 128,256 x 4,096 and 65 norms stay in bf16.
    kept = 2 * 128_256 * 4096 + 65 * 4096
    linear = LLAMA_3_8B_PARAMETERS - kept
    tables = 32 * 7 * 64
    in_4_bits = 2 * kept + linear // 2 + linear // 64 * 4 + tables + frequencies
    assert weight_bytes(model, dtype=kind, load_in="4bit") == in_4_bits
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14_336 + 4096)
    in_8_bits = 2 * kept + linear + 4 * rows + frequencies
    assert weight_bytes(model, dtype=kind, load_in="8bit") == in_8_bits


def test_stored_quantized_weights_take_what_their_files_take(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_tiny_llama().bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **stored}))
    model = resolve_model(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert weight_bytes(model, dtype=torch.bfloat16) == size
    # Nothing is quantized twice.
    assert weight_bytes(model, dtype=torch.bfloat16, load_in="4bit") == size


@pytest.mark.parametrize(
    ("stored", "bits", "group"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4, 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, 64),
        ({"load_in_4bit": True}, 4, 64),
        ({"quant_method": "magic"}, 16, None),
    ],
)
def test_on_the_hub_the_configuration_tells(
    stored: dict[str, Any], bits: int, group: int | None
) -> None:
    model = make_tiny_llama().bfloat16()
    output = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    count = sum(linear.weight.numel() for linear in linears)
    rest = tensor_bytes(model) - 2 * count
    model.config.quantization_config = stored
    scales = 0 if group is None else sum(4 * -(-m.weight.numel() // group) for m in linears)
    planned = weight_bytes(described(model.config), dtype=torch.bfloat16)
    # Here frequencies were cast along with the weights; there they are in fp32.
    assert planned - 2 * 8 * 2 == rest + count * bits // 8 + scales


def test_a_width_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="load_in is '2bit'"):
        weight_bytes(llama_3_8b(), dtype=torch.bfloat16, load_in="2bit")


@pytest.mark.skipif(util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_bitsandbytes_holds_what_is_counted(tiny_model_dir: Path, load_in: str) -> None:
    resolved = resolve_model(tiny_model_dir)
    model = load_model(resolved, device_map="cpu", load_in=load_in).model
    held = tensor_bytes(model)
    for weight in model.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.code.nbytes
        if (scales := getattr(weight, "SCB", None)) is not None:
            held += scales.nbytes
    assert held == weight_bytes(resolved, dtype=model.dtype, load_in=load_in)
