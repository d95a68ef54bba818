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

from kvq_kernels.page_entries import GROWING, PAGE_IDS, token_positions
from kvq_kernels.phases import cos_sin


@triton.jit(do_not_specialize=GROWING)
def key_outlier_scores(
    turned,
    sizes,
    pools,
    counts,
    half_range,
    block_table,
    lengths,
    base_positions,
    irregular_positions,
    phase_high,
    phase_low,
    offset_cos,
    offset_sin,
    weights,
    table_width,
    max_pages,
    weight_tokens,
    score_scale,
    rotary_scaling,
    residual_step,
    H: tl.constexpr,
    G: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHANNEL_BITS: tl.constexpr,
    PART: tl.constexpr,
    IRREGULAR: tl.constexpr,
):
    """Program ``(page of the row, h, b)``: what key outliers add to scores.

    Writes f16 ``[256, G]`` at the page's place in ``weights`` ``[B, H, weight_tokens, G]``, in the
    units of the scores before a soft cap.
    """
    index, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if index < tl.load(lengths + batch * 3):
        page = (tl.load(block_table + batch * table_width + index) & PAGE_IDS).to(tl.int64)
        base = tl.load(base_positions + page)
        row = (batch * H + head).to(tl.int64)
        group_head = tl.arange(0, GROUP_WIDTH)
        queries = turned + (row * max_pages + index) * (D * GROUP_WIDTH) + group_head[:, None]
        scale = tl.load(sizes + row * GROUP_WIDTH + group_head) * score_scale
        line = page * H + head
        pools += line * CAPACITY
        half_range += head * D
        before = 0
        for part in range(256 // PART):
            token = part * PART + tl.arange(0, PART)
            count = tl.load(counts + line * 256 + token).to(tl.int32)
            start = before + tl.cumsum(count, axis=0) - count
            before += tl.sum(count, axis=0)
            scores = tl.zeros([GROUP_WIDTH, PART], tl.float32)
            for step in range(tl.max(count, axis=0)):
                active = step < count
                entry = tl.load(pools + start + step, mask=active, other=0).to(tl.int32)
                channel = entry & ((1 << CHANNEL_BITS) - 1)
                # An entry of 0 is a residual of 0: lanes whose run has ended add nothing.
                residual = (entry >> CHANNEL_BITS).to(tl.float32) * residual_step
                residual *= tl.load(half_range + channel)
                own = tl.load(queries + channel[None, :] * GROUP_WIDTH).to(tl.float32)
                if HALF > 0:
                    is_first = channel < HALF
                    partner = tl.where(is_first, channel + HALF, channel - HALF)
                    pair = tl.minimum(channel, partner)
                    rotated = channel < 2 * HALF
                    if 2 * HALF < D:
                        partner = tl.where(rotated, partner, 0)
                        pair = tl.where(rotated, pair, 0)
                    if IRREGULAR:
                        position = token_positions(base, irregular_positions, token)
                        cos, sin = cos_sin(
                            position, tl.load(phase_high + pair), tl.load(phase_low + pair)
                        )
                        cos *= rotary_scaling
                        sin *= rotary_scaling
                    else:
                        cos = tl.load(offset_cos + token * HALF + pair).to(tl.float32)
                        sin = tl.load(offset_sin + token * HALF + pair).to(tl.float32)
                    # The residual turns into its partner's channel, too; the sine of a second
                    # member is the partner's minus.
                    sin = tl.where(is_first, sin, -sin)
                    if 2 * HALF < D:
                        cos = tl.where(rotated, cos, 1.0)
                        sin = tl.where(rotated, sin, 0.0)
                    other = tl.load(queries + partner[None, :] * GROUP_WIDTH).to(tl.float32)
                    own = own * cos[None, :] + other * sin[None, :]
                scores += own * residual[None, :]
            place = row * weight_tokens + index * 256 + token
            tl.store(
                weights + place[None, :] * G + group_head[:, None],
                (scores * scale[:, None]).to(tl.float16),
                mask=(group_head < G)[:, None],
            )


@triton.jit(do_not_specialize=GROWING)
def value_outlier_sums(
    lists,
    offsets,
    block_table,
    lengths,
    weights,
    page_max,
    page_range,
    split_out,
    split_max,
    table_width,
    max_pages,
    weight_tokens,
    residual_step,
    H: tl.constexpr,
    G: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    EXACT_SPLITS: tl.constexpr,
    PART: tl.constexpr,
):
    """Program ``(split of pages and part, h, b)``: add value outliers to weighted values.

    Reads the weights that the main kernel left, f16, with the half-range of their token in them: in
    units of the page's widest, f32 ``[B, H, max_pages]``, and relative to the largest score that
    the split had met by the end of the page, f32 ``[B, H, max_pages, G]``.
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
        group_head = tl.arange(0, GROUP_WIDTH)
        valid = (group_head < G)[:, None]
        row = (batch * H + head).to(tl.int64)
        line = (row * (splits + EXACT_SPLITS) + EXACT_SPLITS + split) * G + group_head
        largest = tl.load(split_max + line, mask=group_head < G, other=0.0)[:, None]
        sums = tl.zeros([GROUP_WIDTH, PART], tl.float32)
        for index in range(first, last):
            page = (tl.load(block_table + batch * table_width + index) & PAGE_IDS).to(tl.int64)
            entries = lists + (page * H + head) * CAPACITY
            bounds = offsets + (page * H + head) * (D + 1) + channel
            start = tl.load(bounds, mask=is_channel, other=0).to(tl.int32)
            end = tl.load(bounds + 1, mask=is_channel, other=0).to(tl.int32)
            page_weights = weights + (row * weight_tokens + index * 256) * G + group_head[:, None]
            met = page_max + (row * max_pages + index) * G + group_head
            met = tl.load(met, mask=group_head < G, other=-float("inf"))[:, None]
            page_sums = tl.zeros([GROUP_WIDTH, PART], tl.float32)
            for step in range(tl.max(end - start, axis=0)):
                active = start + step < end
                entry = tl.load(entries + start + step, mask=active, other=0).to(tl.int32)
                token = entry & 0xFF
                residual = (entry >> 8).to(tl.float32)
                asked = active[None, :] & valid
                weight = tl.load(page_weights + token[None, :] * G, mask=asked, other=0.0)
                page_sums += weight.to(tl.float32) * residual[None, :]
            unit = tl.load(page_range + row * max_pages + index) * residual_step
            sums += page_sums * (tl.exp2(met - largest) * unit)
        place = split_out + line[:, None] * D + channel[None, :]
        mask = valid & is_channel[None, :]
        tl.store(place, tl.load(place, mask=mask, other=0.0) + sums, mask=mask)
