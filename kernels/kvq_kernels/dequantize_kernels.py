"""Kernels that turn pages into token-major numbers: the dense part, then outliers.

Outliers are added by kernels of their own, launched after the dense part: a lane owns a token
(keys) or a channel (values) and walks its own run of entries. In one launch no number is touched
twice, so that nothing depends on the order in which lanes run.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kvq_formats.pages import HALF_LARGEST
from kvq_kernels.page_entries import token_positions
from kvq_kernels.pair_lookup import GROUP, GROUPS, decode_pairs, group_shift, group_words
from kvq_kernels.phases import cos_sin

LARGEST: Final = tl.constexpr(HALF_LARGEST)


@triton.jit
def _numbers(
    plane_stride,
    words,
    subset,
    group,
    table,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Codes of one group to normalised numbers, f32 ``[..., 2 n]``; ``words`` ``[..., n]``.

    ``table``: with WIDE the entries f32 ``[2**BITS]``, else ``pair_lookup.pair_table``.
    """
    if BITS == 3:
        if group == 3:
            coded = group_words(plane_stride, words, group, BITS, True)
        else:
            coded = group_words(plane_stride, words, group, BITS, False)
    else:
        coded = group_words(plane_stride, words, group, BITS, False)
    shift = group_shift(subset, group, BITS)
    if WIDE:
        upper_shift = shift + (8 if BITS == 2 else 4)
        lower = tl.load(table + ((coded >> shift) & ((1 << BITS) - 1)))
        upper = tl.load(table + ((coded >> upper_shift) & ((1 << BITS) - 1)))
        numbers = tl.reshape(tl.join(lower, upper), [coded.shape[0], 2 * coded.shape[1]])
    else:
        numbers = decode_pairs(coded, shift, table, BITS).to(tl.float32)
    return numbers


@triton.jit
def _store(place, numbers, mask):
    """Store f32 numbers, rounded and saturated where memory holds f16."""
    if place.dtype.element_ty == tl.float16:
        numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
    tl.store(place, numbers.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _keys(
    words,
    half_range,
    center,
    table,
    group,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keys before RoPE, f32 ``[64, TILE]``; places behind COUNT repeat channels before."""
    token = tl.arange(0, GROUP)
    pair, channel = tl.arange(0, TILE // 2), tl.arange(0, TILE)
    if TILE > COUNT:
        pair, channel = tl.minimum(pair, COUNT // 2 - 1), tl.minimum(channel, COUNT - 1)
    pair, channel = FIRST // 2 + pair, FIRST + channel
    places = words + (token % 16)[:, None] * (D // 2) + pair[None, :]
    numbers = _numbers(8 * D, places, (token // 16)[:, None], group, table, BITS, WIDE)
    return numbers * tl.load(half_range + channel)[None, :] + tl.load(center + channel).to(
        tl.float32
    )


@triton.jit
def dequantize_key_pages(
    output,
    words,
    half_range,
    center,
    table,
    ids,
    base_positions,
    irregular_positions,
    phase_high,
    phase_low,
    tokens,
    rotary_scaling,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    IRREGULAR: tl.constexpr,
):
    """Program ``(4 n + group, h)``: 64 tokens of the n-th page, without outliers.

    ``output`` is f16 or f32 ``[H, tokens, D]``. HALF rotary pairs are turned to their positions; 0
    leaves all channels before RoPE.
    """
    step, head = tl.program_id(0), tl.program_id(1)
    group = step % GROUPS
    page = tl.load(ids + step // GROUPS).to(tl.int64)
    words += (page * H + head) * (BITS * 8 * D)
    half_range += head * D
    center += head * D
    token = tl.arange(0, GROUP)
    output += (head.to(tl.int64) * tokens + step * GROUP + token)[:, None] * D
    if HALF > 0:
        first = _keys(words, half_range, center, table, group, 0, HALF, HALF_TILE, D, BITS, WIDE)
        second = _keys(
            words, half_range, center, table, group, HALF, HALF, HALF_TILE, D, BITS, WIDE
        )
        pair = tl.arange(0, HALF_TILE)
        is_pair = pair < HALF
        base = tl.load(base_positions + page)
        position = base + group * GROUP + token
        if IRREGULAR:
            position = token_positions(base, irregular_positions, group * GROUP + token)
        high = tl.load(phase_high + pair, mask=is_pair, other=0)
        low = tl.load(phase_low + pair, mask=is_pair, other=0)
        cos, sin = cos_sin(position[:, None], high[None, :], low[None, :])
        cos *= rotary_scaling
        sin *= rotary_scaling
        places = output + pair[None, :]
        _store(places, first * cos - second * sin, is_pair[None, :])
        _store(places + HALF, second * cos + first * sin, is_pair[None, :])
    if REST_TILE > 0:
        rest = _keys(
            words, half_range, center, table, group,
            2 * HALF, D - 2 * HALF, REST_TILE, D, BITS, WIDE,
        )  # fmt: skip
        channel = tl.arange(0, REST_TILE)
        _store(output + 2 * HALF + channel[None, :], rest, (channel < D - 2 * HALF)[None, :])


@triton.jit
def add_key_outliers(
    output,
    pools,
    counts,
    half_range,
    ids,
    base_positions,
    irregular_positions,
    phase_high,
    phase_low,
    tokens,
    rotary_scaling,
    residual_step,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHANNEL_BITS: tl.constexpr,
    IRREGULAR: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Program ``(n, h)``: add the n-th page's outliers.

    ``output`` is f16 or f32 ``[H, tokens, D]``. A rotated residual reaches both channels of its
    pair, and so would its partner's: SECOND takes the entries that are second members of pairs,
    without it all others are taken.
    """
    place, head = tl.program_id(0), tl.program_id(1)
    page = tl.load(ids + place).to(tl.int64)
    token = tl.arange(0, 256)
    line = page * H + head
    count = tl.load(counts + line * 256 + token).to(tl.int32)
    start = tl.cumsum(count, axis=0) - count
    pools += line * CAPACITY
    half_range += head * D
    output += (head.to(tl.int64) * tokens + place * 256 + token) * D
    base = tl.load(base_positions + page)
    position = base + token
    if IRREGULAR:
        position = token_positions(base, irregular_positions, token)
    for step in range(tl.max(count, axis=0)):
        active = step < count
        entry = tl.load(pools + start + step, mask=active, other=0).to(tl.int32)
        channel = entry & ((1 << CHANNEL_BITS) - 1)
        residual = (entry >> CHANNEL_BITS).to(tl.float32) * residual_step
        residual *= tl.load(half_range + channel, mask=active, other=0.0)
        if HALF > 0:
            is_second = (channel >= HALF) & (channel < 2 * HALF)
            active &= is_second if SECOND else ~is_second
            rotated = channel < 2 * HALF
            pair = tl.where(rotated, channel % HALF, 0)
            high, low = tl.load(phase_high + pair), tl.load(phase_low + pair)
            cos, sin = cos_sin(position, high, low)
            reaches = active & rotated
            partner = output + tl.where(is_second, channel - HALF, channel + HALF)
            turned = residual * (tl.where(is_second, -sin, sin) * rotary_scaling)
            before = tl.load(partner, mask=reaches, other=0.0).to(tl.float32)
            _store(partner, before + turned, reaches)
            residual *= tl.where(rotated, cos * rotary_scaling, 1.0)
        before = tl.load(output + channel, mask=active, other=0.0).to(tl.float32)
        _store(output + channel, before + residual, active)


@triton.jit
def dequantize_value_pages(
    output,
    words,
    scales,
    table,
    ids,
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_HEADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program ``(4 n + group, h)``: 64 tokens of the n-th page, without outliers.

    ``output`` is f16 or f32 ``[H, tokens, D]``: values in their own units.
    """
    step, head = tl.program_id(0), tl.program_id(1)
    group = step % GROUPS
    page = tl.load(ids + step // GROUPS).to(tl.int64)
    channel = tl.arange(0, D_TILE)
    row = tl.minimum(channel, D - 1) if D_TILE > D else channel
    pair = tl.arange(0, GROUP // 2)
    places = words + (page * H + head) * (BITS * 8 * D) + row[:, None] * 8 + (pair % 8)[None, :]
    numbers = _numbers(8 * D, places, (pair // 8)[None, :], group, table, BITS, WIDE)
    token = tl.arange(0, GROUP)
    scale_head = head if SCALE_HEADS > 1 else 0
    scales += (page * SCALE_HEADS + scale_head) * 512 + (group * GROUP + token) * 2
    token_range = tl.load(scales).to(tl.float32)
    token_center = tl.load(scales + 1).to(tl.float32)
    numbers = numbers * token_range[None, :] + token_center[None, :]
    places = (head.to(tl.int64) * tokens + step * GROUP + token)[None, :] * D + channel[:, None]
    _store(output + places, numbers, (channel < D)[:, None])


@triton.jit
def add_value_outliers(
    output,
    lists,
    offsets,
    scales,
    ids,
    tokens,
    residual_step,
    H: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    SCALE_HEADS: tl.constexpr,
):
    """Program ``(n, h)``: add the n-th page's outliers to ``output`` ``[H, tokens, D]``."""
    place, head = tl.program_id(0), tl.program_id(1)
    page = tl.load(ids + place).to(tl.int64)
    channel = tl.arange(0, D_TILE)
    is_channel = channel < D
    line = page * H + head
    lists += line * CAPACITY
    bounds = offsets + line * (D + 1) + channel
    start = tl.load(bounds, mask=is_channel, other=0).to(tl.int32)
    end = tl.load(bounds + 1, mask=is_channel, other=0).to(tl.int32)
    scale_head = head if SCALE_HEADS > 1 else 0
    scales += (page * SCALE_HEADS + scale_head) * 512
    output += (head.to(tl.int64) * tokens + place * 256) * D + channel
    for step in range(tl.max(end - start, axis=0)):
        active = start + step < end
        entry = tl.load(lists + start + step, mask=active, other=0).to(tl.int32)
        token = entry & 0xFF
        residual = (entry >> 8).to(tl.float32) * residual_step
        residual *= tl.load(scales + 2 * token, mask=active, other=0.0).to(tl.float32)
        before = tl.load(output + token * D, mask=active, other=0.0).to(tl.float32)
        _store(output + token * D, before + residual, active)
