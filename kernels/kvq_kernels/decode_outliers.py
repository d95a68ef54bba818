"""Decode attention, side passes: outliers of keys before the main kernel, of values after it.

Outliers are residuals that simply add (``kvq_formats.outliers``). Entries of keys are sorted by
token and of values by channel, so that a lane that owns a token, or a channel, walks its own run:
nothing is scattered, and no two lanes write to one place. All lanes of a program walk as far as its
longest run, so a program is one warp, with a *part* of the tokens or channels, one a lane.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kvq_kernels.pair_lookup import GROUP, GROUPS
from kvq_kernels.phases import cos_sin


@triton.jit
def key_outlier_scores(
    query,
    pools,
    counts,
    half_range,
    block_table,
    lengths,
    base_positions,
    irregular_positions,
    phase_high,
    phase_low,
    weights,
    table_width,
    weight_tokens,
    score_scale,
    rotary_scaling,
    residual_step,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHANNEL_BITS: tl.constexpr,
    PART: tl.constexpr,
):
    """Program ``(page of the row and part, h, b)``: what key outliers add to scores.

    Writes f16 ``[PART, G]`` at the tokens' place in ``weights`` ``[B, H, weight_tokens, G]``, in
    the units of the scores before a soft cap.
    """
    PARTS: tl.constexpr = 256 // PART
    index, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    if index < tl.load(lengths + batch * 3):
        page = (tl.load(block_table + batch * table_width + index) & 0x7FFFFF).to(tl.int64)
        base = tl.load(base_positions + page)
        token = part * PART + tl.arange(0, PART)
        position = base + token
        if base < 0:
            position = tl.load(irregular_positions - (base + 1) * 256 + token)
        group_head = tl.arange(0, N)
        valid = (group_head < G)[:, None]
        line = page * H + head
        every = tl.arange(0, 256)
        before = tl.load(counts + line * 256 + every).to(tl.int32)
        before = tl.sum(tl.where(every < part * PART, before, 0), axis=0)
        count = tl.load(counts + line * 256 + token).to(tl.int32)
        start = before + tl.cumsum(count, axis=0) - count
        pools += line * CAPACITY
        queries = query + (batch * H + head) * G * D + group_head[:, None] * D
        half_range += head * D
        scores = tl.zeros([N, PART], tl.float32)
        for step in range(tl.max(count, axis=0)):
            active = step < count
            entry = tl.load(pools + start + step, mask=active, other=0).to(tl.int32)
            channel = entry & ((1 << CHANNEL_BITS) - 1)
            residual = (entry >> CHANNEL_BITS).to(tl.float32) * residual_step
            residual *= tl.load(half_range + channel, mask=active, other=0.0)
            asked = active[None, :] & valid
            own = tl.load(queries + channel[None, :], mask=asked, other=0.0).to(tl.float32)
            if HALF > 0:
                is_first = channel < HALF
                rotated = channel < 2 * HALF
                pair = tl.where(rotated, tl.where(is_first, channel, channel - HALF), 0)
                high, low = tl.load(phase_high + pair), tl.load(phase_low + pair)
                cos, sin = cos_sin(position, high, low)
                cos = tl.where(rotated, cos * rotary_scaling, 1.0)
                # The residual turns into its partner's channel, too; the sine of a second member
                # is the partner's minus.
                sin = tl.where(rotated, tl.where(is_first, sin, -sin) * rotary_scaling, 0.0)
                partner = tl.where(is_first, channel + HALF, channel - HALF)
                asked &= rotated[None, :]
                other = tl.load(queries + partner[None, :], mask=asked, other=0.0).to(tl.float32)
                own = own * cos[None, :] + other * sin[None, :]
            scores += own * residual[None, :]
        place = (batch * H + head).to(tl.int64) * weight_tokens + index * 256 + token
        tl.store(
            weights + place[None, :] * G + group_head[:, None],
            (scores * score_scale).to(tl.float16),
            mask=valid,
        )


@triton.jit
def value_outlier_sums(
    lists,
    offsets,
    scales,
    block_table,
    lengths,
    weights,
    group_max,
    split_out,
    split_max,
    table_width,
    weight_tokens,
    residual_step,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    SCALE_HEADS: tl.constexpr,
    EXACT_SPLITS: tl.constexpr,
    PART: tl.constexpr,
):
    """Program ``(split of pages and part, h, b)``: add value outliers to weighted values.

    Reads the weights that the main kernel left, f16, relative to the largest score of their group
    of 64 tokens at that moment, f32 ``[B, H, weight_tokens / 64, G]``.
    """
    PARTS: tl.constexpr = (D + PART - 1) // PART
    split, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    splits = tl.num_programs(0) // PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    pages = tl.load(lengths + batch * 3)
    each = tl.cdiv(pages, splits)
    first = split * each
    last = tl.minimum(first + each, pages)
    if first < last:
        channel = part * PART + tl.arange(0, PART)
        is_channel = channel < D
        group_head = tl.arange(0, N)
        valid = (group_head < G)[:, None]
        row = (batch * H + head).to(tl.int64)
        line = (row * (splits + EXACT_SPLITS) + EXACT_SPLITS + split) * G + group_head
        largest = tl.load(split_max + line, mask=group_head < G, other=0.0)[:, None]
        sums = tl.zeros([N, PART], tl.float32)
        for index in range(first, last):
            page = (tl.load(block_table + batch * table_width + index) & 0x7FFFFF).to(tl.int64)
            entries = lists + (page * H + head) * CAPACITY
            bounds = offsets + (page * H + head) * (D + 1) + channel
            start = tl.load(bounds, mask=is_channel, other=0).to(tl.int32)
            end = tl.load(bounds + 1, mask=is_channel, other=0).to(tl.int32)
            scale_head = head if SCALE_HEADS > 1 else 0
            page_scales = scales + (page * SCALE_HEADS + scale_head) * 512
            page_weights = weights + (row * weight_tokens + index * 256) * G + group_head[:, None]
            maxima = group_max + (row * (weight_tokens // GROUP) + index * GROUPS) * G
            for step in range(tl.max(end - start, axis=0)):
                active = start + step < end
                entry = tl.load(entries + start + step, mask=active, other=0).to(tl.int32)
                token = entry & 0xFF
                residual = (entry >> 8).to(tl.float32) * residual_step
                residual *= tl.load(page_scales + 2 * token, mask=active, other=0.0).to(tl.float32)
                asked = active[None, :] & valid
                weight = tl.load(page_weights + token[None, :] * G, mask=asked, other=0.0)
                place = (token // GROUP)[None, :] * G + group_head[:, None]
                moved = tl.load(maxima + place, mask=asked, other=-float("inf"))
                sums += weight.to(tl.float32) * tl.exp2(moved - largest) * residual[None, :]
        place = split_out + line[:, None] * D + channel[None, :]
        mask = valid & is_channel[None, :]
        tl.store(place, tl.load(place, mask=mask, other=0.0) + sums, mask=mask)
