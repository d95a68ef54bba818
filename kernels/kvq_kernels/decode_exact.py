"""Decode attention, exact tokens: sinks, recent ones and those of an unfinished page."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kvq_kernels.page_entries import GROWING
from kvq_kernels.phases import cos_sin
from kvq_kernels.scores import soft_capped
from kvq_kernels.split_states import write_split

EXACT_TILE: Final = tl.constexpr(32)
"""Exact tokens of a program."""


@triton.jit
def _query(query, FIRST: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, head_offset, valid):
    """Queries f32 ``[TILE, N]``, zero where there is none."""
    place = tl.arange(0, TILE)
    mask = (place < COUNT)[:, None] & valid[None, :]
    return tl.load(query + head_offset[None, :] + FIRST + place[:, None], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=GROWING)
def exact_splits(
    query,
    lengths,
    phase_high,
    phase_low,
    exact_keys,
    exact_values,
    exact_positions,
    split_out,
    split_max,
    split_sum,
    exact_room,
    splits,
    score_scale,
    softcap,
    rotary_scaling,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ``(tile, h, b)``: the first of ``splits`` splits, a tile of 32 tokens each."""
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group_head = tl.arange(0, N)
    valid = group_head < G
    state_max = tl.full([N], -float("inf"), tl.float32)
    state_sum = tl.zeros([N], tl.float32)
    state_out = tl.zeros([D_TILE, N], tl.float32)
    count = tl.load(lengths + batch * 3 + 1) + tl.load(lengths + batch * 3 + 2)
    place = split * EXACT_TILE + tl.arange(0, EXACT_TILE)
    held = place < count
    line = (batch * H + head).to(tl.int64) * exact_room
    keys = exact_keys + (line + place)[:, None] * D
    scores = tl.zeros([EXACT_TILE, N], tl.float32)
    if split * EXACT_TILE < count:
        own = query + (batch * H + head) * G * D
        head_offset = group_head * D
        if HALF > 0:
            query_first = _query(own, 0, HALF, HALF_TILE, head_offset, valid)
            query_second = _query(own, HALF, HALF, HALF_TILE, head_offset, valid)
            pair = tl.arange(0, HALF_TILE)
            loaded = held[:, None] & (pair < HALF)[None, :]
            first = tl.load(keys + pair[None, :], mask=loaded, other=0.0).to(tl.float32)
            second = tl.load(keys + HALF + pair[None, :], mask=loaded, other=0.0).to(tl.float32)
            position = tl.load(exact_positions + batch * exact_room + place, mask=held, other=0)
            high = tl.load(phase_high + pair, mask=pair < HALF, other=0)[None, :]
            low = tl.load(phase_low + pair, mask=pair < HALF, other=0)[None, :]
            cos, sin = cos_sin(position[:, None], high, low)
            cos *= rotary_scaling
            sin *= rotary_scaling
            scores = tl.dot(
                first * cos - second * sin, query_first, scores, input_precision=PRECISION
            )
            scores = tl.dot(
                second * cos + first * sin, query_second, scores, input_precision=PRECISION
            )
        if REST_TILE > 0:
            query_rest = _query(own, 2 * HALF, D - 2 * HALF, REST_TILE, head_offset, valid)
            pair = tl.arange(0, REST_TILE)
            loaded = held[:, None] & (pair < D - 2 * HALF)[None, :]
            rest = tl.load(keys + 2 * HALF + pair[None, :], mask=loaded, other=0.0)
            scores = tl.dot(rest.to(tl.float32), query_rest, scores, input_precision=PRECISION)
        scores *= score_scale
        if SOFTCAP:
            scores = soft_capped(scores, softcap)
        scores = tl.where(held[:, None], scores, -float("inf"))
        state_max = tl.max(scores, axis=0)
        weight = tl.exp2(scores - state_max[None, :])
        state_sum = tl.sum(weight, axis=0)
        channel = tl.arange(0, D_TILE)
        values = tl.load(
            exact_values + (line + place)[None, :] * D + channel[:, None],
            mask=held[None, :] & (channel < D)[:, None],
            other=0.0,
        )
        state_out = tl.dot(values.to(tl.float32), weight, state_out, input_precision=PRECISION)

    line = ((batch * H + head).to(tl.int64) * splits + split) * G
    write_split(split_out, split_max, split_sum, line, state_out, state_max, state_sum, G, D)
