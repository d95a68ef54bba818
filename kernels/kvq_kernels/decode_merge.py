"""Decode attention, last kernel: splits become one output by their log-sum-exp."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kvq_kernels.page_entries import GROWING
from kvq_kernels.scores import LOG2_E

SPLIT_TILE: Final = tl.constexpr(16)
"""Splits that are merged at a time."""

MAXIMA_TILE: Final = tl.constexpr(128)
"""Splits whose largest scores are read at a time."""


@triton.jit(do_not_specialize=GROWING)
def merge_splits(
    split_out,
    split_max,
    split_sum,
    sink_logits,
    output,
    splits,
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
):
    """Program ``(query head, b)``: one head's output, f32 ``[D]`` of ``[B, HQ, D]``.

    A row without tokens gives 0. ``sink_logits`` f32 ``[HQ]``: a score that carries no value.
    """
    query_head, batch = tl.program_id(0), tl.program_id(1)
    row = (batch * (HQ // G) + query_head // G).to(tl.int64) * splits
    channel = tl.arange(0, D_TILE)
    is_channel = (channel < D)[None, :]
    largest = -float("inf")
    if SINK_LOGITS:
        # In units of exp2.
        largest = tl.load(sink_logits + query_head) * LOG2_E
    sink = largest
    # The largest score first, so that rounds of the second loop do not wait for each other.
    for first in range(0, splits, MAXIMA_TILE):
        split = first + tl.arange(0, MAXIMA_TILE)
        line = (row + split) * G + query_head % G
        found = tl.load(split_max + line, mask=split < splits, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(found, axis=0))
    # Where nothing has been seen the exponent must not become inf - inf.
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    totals = tl.zeros([SPLIT_TILE], tl.float32)
    sums = tl.zeros([SPLIT_TILE, D_TILE], tl.float32)
    for first in range(0, splits, SPLIT_TILE):
        split = first + tl.arange(0, SPLIT_TILE)
        held = split < splits
        line = (row + split) * G + query_head % G
        found = tl.load(split_max + line, mask=held, other=-float("inf"))
        factor = tl.exp2(found - largest)
        totals += factor * tl.load(split_sum + line, mask=held, other=0.0)
        outputs = tl.load(
            split_out + line[:, None] * D + channel[None, :],
            mask=held[:, None] & is_channel,
            other=0.0,
        )
        sums += outputs * factor[:, None]
    total = tl.exp2(sink - largest) + tl.sum(totals, axis=0)
    place = (batch * HQ + query_head) * D + channel
    tl.store(
        output + place, tl.sum(sums, axis=0) / tl.where(total > 0, total, 1.0), mask=channel < D
    )
