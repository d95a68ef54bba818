"""What a model's weights take in memory, counted before any of them is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvq_formats.errors import ConfigError
from kvq_runtime.model_files import stored_dtype, weight_files
from kvq_runtime.models import DTYPES
from kvq_runtime.resolve import ResolvedModel
from kvq_runtime.weight_quantization import check_load_in, stored_quantization

NF4_BLOCK = 64
"""Weights that share one f32 scale, where bitsandbytes holds 4 bits."""
NF4_TABLE = 16 * 4
"""Bytes of the f32 table of 16 numbers that each linear layer in NF4 has."""


def weights_dtype(model: ResolvedModel, dtype: str) -> torch.dtype:
    """What ``load_model`` loads with ``dtype``; float32 where ``auto`` cannot be told.

    Raises ConfigError for a name that it does not know.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}.", hint=f"--dtype {'|'.join(DTYPES)}")
    if dtype == "auto":
        # As transformers does; where neither says it, the largest is assumed.
        found = model.config.dtype or (stored_dtype(model.location) if model.is_local else None)
        dtype = str(found or "float32").removeprefix("torch.")
    kind: torch.dtype = getattr(torch, dtype)
    return kind


def without_weights(model: ResolvedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the ``meta`` device: shapes, and no numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model.config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )


def tensor_bytes(model: PreTrainedModel) -> int:
    """Parameters and buffers; each tied one once."""
    # Both iterators name a tied tensor once.
    return sum(tensor.nbytes for part in (model.parameters(), model.buffers()) for tensor in part)


def weight_bytes(model: ResolvedModel, *, dtype: torch.dtype, load_in: str | None = None) -> int:
    """Bytes of the weights as ``load_model`` holds them.

    In 4 bits ``n / 2`` of a linear layer of n weights and an f32 for 64; in 8 bits n, and an f32 a
    row; the output layer, embeddings and norms stay in ``dtype``. What is stored quantized takes
    what its files take; on the Hub, what its configuration says of bits and groups.
    """
    check_load_in(load_in)
    if stored_quantization(model.config) is not None:
        if model.is_local:
            return sum(file.stat().st_size for file in weight_files(Path(model.location)))
        load_in = None
    shapes = without_weights(model, dtype)
    total = tensor_bytes(shapes)
    output = shapes.get_output_embeddings()
    linears = [m for m in shapes.modules() if isinstance(m, nn.Linear) and m is not output]
    return total + sum(_held(linear, model, load_in) - linear.weight.nbytes for linear in linears)


def _held(linear: nn.Linear, model: ResolvedModel, load_in: str | None) -> int:
    count = linear.weight.numel()
    if load_in == "4bit":
        return -(-count // 2) + 4 * -(-count // NF4_BLOCK) + NF4_TABLE
    if load_in == "8bit":
        return count + 4 * linear.out_features
    bits, group = _stored_bits(model)
    if bits is None:
        return linear.weight.nbytes
    # Each group has a scale of 16 bits and a zero of at most as many.
    return -(-count * bits // 8) + 4 * -(-count // group)


def _stored_bits(model: ResolvedModel) -> tuple[int | None, int]:
    """Bits of a weight and weights of a group, from a stored configuration; None if not said."""
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is None:
        return None, 1
    given = stored if isinstance(stored, dict) else stored.to_dict()
    named = {4: given.get("load_in_4bit"), 8: given.get("load_in_8bit")}
    bits = given.get("bits") or next((width for width, yes in named.items() if yes), None)
    group = given.get("group_size") or NF4_BLOCK
    return (bits, group if group > 0 else NF4_BLOCK) if isinstance(bits, int) else (None, 1)
