"""Every family from calibration to generation, at 4 bits."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibrated import calibrated, divergence
from families import FAMILIES
from garbage import with_garbage_codebooks
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, cache_bytes, packed_layers
from kvq_runtime.evaluation_rule import attach_codec
from kvq_runtime.layer import PackedLayer
from kvq_runtime.supported_models import layer_types
from largest_errors import LargestErrors
from padded_batches import batch, fed

PADDING = 37
TOKENS = 560
CHUNKS = [544, *[1] * 16]


@pytest.mark.parametrize("title", FAMILIES)
def test_four_bits(title: str) -> None:
    """KL below that of the largest errors which 4-bit codes allow; see ``largest_errors``."""
    family = FAMILIES[title]
    model = family.make()
    sidecar = calibrated(model)
    assert tuple(sidecar.layers) == family.quantized
    assert sidecar.rotary_channels == family.rotary_channels
    ids, mask, positions = batch(TOKENS, PADDING)
    inputs = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        stock = model(ids, **inputs).logits
        with attach_codec(model, LargestErrors(sidecar)):
            bound = divergence(stock, model(ids, **inputs).logits, mask)
        with attach(model, sidecar, rule="evaluation"):
            assert 0 < divergence(stock, model(ids, **inputs).logits, mask) < bound
        with attach(model, with_garbage_codebooks(sidecar), rule="evaluation"):
            assert divergence(stock, model(ids, **inputs).logits, mask) > bound
        check_the_packed_cache(model, sidecar, stock, bound)


def check_the_packed_cache(
    model: PreTrainedModel, sidecar: Sidecar, stock: Tensor, bound: float
) -> None:
    """The runtime rule: a prompt, 16 steps, bytes as planned, and text out of generate."""
    ids, mask, positions = batch(TOKENS, PADDING)
    cache = PackedCache(model, sidecar, capacity=TOKENS, batch_size=2)
    with attach(model, sidecar):
        found, used = fed(model, ids, mask, positions, CHUNKS, cache)
        assert used is cache
        assert 0 < divergence(stock, found, mask) < bound
        packed = list(packed_layers(cache))
        stock_bytes = sum(tensor.nbytes for tensor in cache._stock_tensors)
        assert cache.allocated_bytes == sum(map(tensor_bytes, packed)) + stock_bytes
        if "linear_attention" not in layer_types(model.config):
            planned = cache_bytes(
                model.config, sidecar, capacity=TOKENS, batch_size=2, dtype=torch.float32
            )
            assert cache.allocated_bytes == planned
        text = model.generate(
            ids[:, :300], attention_mask=mask[:, :300], max_new_tokens=3, do_sample=False
        )
    assert text.shape[1] > 300


def tensor_bytes(layer: PackedLayer) -> int:
    """Of everything that a packed layer holds for its rows, found by looking."""
    pages = [getattr(part, field.name) for part in layer.pool.whole() for field in fields(part)]
    exact = [layer.exact.keys, layer.exact.values, layer.exact.positions]
    return sum(tensor.nbytes for tensor in (*pages, *exact, layer.block_table))
