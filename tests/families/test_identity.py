"""Every family on pages that lose nothing does what the stock model does (the identity path)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from exact_angles import ExactAngles
from exact_pages import exact_codecs
from families import FAMILIES
from kvq_runtime.cache import PackedCache, packed_layers
from kvq_runtime.rope import tap_attention
from kvq_runtime.runtime_rule import attach_pages
from padded_batches import batch, fed

EPS = torch.finfo(torch.float32).eps
ONE_SUM = 64 * EPS
"""What rounding adds to a sum over the 64 channels of a hidden state, in units of the largest."""

PADDING = 37
TOKENS = 600
CHUNKS = [584, *[1] * 16]


@pytest.mark.parametrize("title", FAMILIES)
@torch.no_grad()
def test_exact_pages_change_nothing_but_roundings(title: str) -> None:
    """Prefill over three pages and 16 decode steps, against the model with exact angles in f64.

    The stock model in f32 misses that by the roundings of its sums, and of its angles, which are
    off by ``position * 2**-24``. Ours come in another order and its angles are exact: it may miss
    it by twice as much, and by the roundings of the logits themselves.
    """
    family = FAMILIES[title]
    model = family.make()
    channels = family.rotary_channels
    ids, mask, positions = batch(TOKENS, PADDING)
    stock, _ = fed(model, ids, mask, positions, CHUNKS)
    codecs = exact_codecs(model, channels)
    assert tuple(codecs) == family.quantized
    with attach_pages(model, codecs):
        found, cache = fed(model, ids, mask, positions, CHUNKS)
    assert isinstance(cache, PackedCache)
    assert cache.tokens_held == [TOKENS - PADDING, TOKENS]
    packed = list(packed_layers(cache))
    assert len(packed) == len(family.quantized)
    assert all(len(row.pages) == 2 for layer in packed for row in layer.rows)
    exact = model.double()
    without_kernels(exact)
    truth = torch.zeros_like(found, dtype=torch.float64)
    # Row by row: padding that sees nothing gives NaN in f64, and then to all that see it.
    for row, padding in enumerate((PADDING, 0)):
        places = positions[row : row + 1, padding:]
        with tap_attention(exact, ExactAngles(exact, places, channels)):
            truth[row, padding:] = exact(ids[row : row + 1, padding:], position_ids=places).logits
    attended = mask.bool()
    misses = (found.double() - truth)[attended].abs().max()
    stock_misses = (stock.double() - truth)[attended].abs().max()
    assert misses <= 2 * stock_misses + ONE_SUM * truth[attended].abs().max()


def without_kernels(model: PreTrainedModel) -> None:
    """Experts one by one: torch has no grouped products in f64."""
    if getattr(model.config, "num_local_experts", None) or hasattr(model.config, "num_experts"):
        setter: Any = getattr(model, "set_experts_implementation", None)
        if setter is not None:
            setter("eager")


@pytest.mark.parametrize("title", FAMILIES)
@torch.no_grad()
def test_where_the_models_own_attention_runs_no_bit_changes(title: str) -> None:
    """The prompt under exact-prefill: same hooks, keys stored before RoPE, stock attention."""
    family = FAMILIES[title]
    model = family.make()
    ids, mask, positions = batch(TOKENS, PADDING)
    stock = model(ids, attention_mask=mask, position_ids=positions).logits
    codecs = exact_codecs(model, family.rotary_channels)
    with attach_pages(model, codecs, rule="exact-prefill"):
        found = model(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(found.logits, stock)
    assert found.past_key_values.tokens_held == [TOKENS - PADDING, TOKENS]
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, stock)
