"""Decode attention, main kernel: one program reads a run of pages.

Scores are kept as ``[tokens, group]`` and outputs as ``[channels, group]``: tokens and channels
fill the long side of a matrix instruction, the query heads that share a key/value head the short
one, so that every number of the cache is decoded once a group (``docs/kernels.md``).
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from kvq_kernels.page_entries import CUT, GROWING, PAGE_IDS, token_positions
from kvq_kernels.pair_lookup import GROUP, decode_pairs, group_shift, group_words
from kvq_kernels.phases import cos_sin
from kvq_kernels.scores import soft_capped
from kvq_kernels.split_states import write_split


@triton.jit
def _keys(
    words,
    half_range,
    center,
    table,
    row,
    shift,
    group,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
):
    """Keys before RoPE, f16 ``[64, TILE]``, of channels FIRST to FIRST + COUNT - 1."""
    pair, place = tl.arange(0, TILE // 2), tl.arange(0, TILE)
    words += row[:, None] * (D // 2) + FIRST // 2 + pair[None, :]
    # Behind COUNT: codes of anything, scaled to 0, as their queries are.
    inside = place < COUNT
    coded = group_words(8 * D, words, group, BITS, group == 3, (pair < COUNT // 2)[None, :])
    numbers = decode_pairs(coded, shift[:, None], table, BITS)
    scale = tl.load(half_range + FIRST + place, mask=inside, other=0.0)
    shifted = tl.load(center + FIRST + place, mask=inside, other=0.0)
    return numbers * scale[None, :] + shifted[None, :]


@triton.jit
def _turned(
    queries,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    group_head,
    WIDTH: tl.constexpr,
):
    """Queries of a page f16 ``[TILE, N]``, zero where there is none."""
    place = tl.arange(0, TILE)
    mask = (place < COUNT)[:, None] & (group_head < WIDTH)[None, :]
    return tl.load(
        queries + (FIRST + place)[:, None] * WIDTH + group_head[None, :], mask=mask, other=0.0
    )


@triton.jit
def _scores(
    query_first,
    query_second,
    query_rest,
    query_scale,
    key_words,
    half_range,
    center,
    key_table,
    offset_cos,
    offset_sin,
    phase_high,
    phase_low,
    base,
    irregular_positions,
    rotary_scaling,
    weights,
    length,
    softcap,
    group_head,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    BITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    IRREGULAR: tl.constexpr,
    group: tl.constexpr,
):
    """Scores of 64 tokens of a page, in units of ``exp2``, f32 ``[64, N]``."""
    token = tl.arange(0, GROUP)
    place = group * GROUP + token
    row, subset = token % 16, token // 16
    shift = group_shift(subset, group, BITS)
    scores = tl.zeros([GROUP, group_head.shape[0]], tl.float32)
    if HALF > 0:
        first = _keys(
            key_words, half_range, center, key_table, row, shift, group,
            0, HALF, HALF_TILE, D, BITS,
        )  # fmt: skip
        second = _keys(
            key_words, half_range, center, key_table, row, shift, group,
            HALF, HALF, HALF_TILE, D, BITS,
        )  # fmt: skip
        pair = tl.arange(0, HALF_TILE)
        inside = pair < HALF
        if IRREGULAR:
            high = tl.load(phase_high + pair, mask=inside, other=0)[None, :]
            low = tl.load(phase_low + pair, mask=inside, other=0)[None, :]
            # Absolute, and the page's queries are not turned back.
            position = token_positions(base, irregular_positions, place)
            cos, sin = cos_sin(position[:, None], high, low)
            cos = (cos * rotary_scaling).to(tl.float16)
            sin = (sin * rotary_scaling).to(tl.float16)
        else:
            angle = place[:, None] * HALF + pair[None, :]
            cos = tl.load(offset_cos + angle, mask=inside[None, :], other=0.0)
            sin = tl.load(offset_sin + angle, mask=inside[None, :], other=0.0)
        scores = tl.dot(first * cos - second * sin, query_first, scores)
        scores = tl.dot(second * cos + first * sin, query_second, scores)
    if REST_TILE > 0:
        rest = _keys(
            key_words, half_range, center, key_table, row, shift, group,
            2 * HALF, D - 2 * HALF, REST_TILE, D, BITS,
        )  # fmt: skip
        scores = tl.dot(rest, query_rest, scores)
    scores *= query_scale[None, :]
    if KEY_OUTLIERS:
        outlier_scores = weights + place[:, None] * G + group_head[None, :]
        is_head = (group_head < G)[None, :]
        scores += tl.load(outlier_scores, mask=is_head, other=0.0).to(tl.float32)
    if SOFTCAP:
        scores = soft_capped(scores, softcap)
    return tl.where((place < length)[:, None], scores, -float("inf"))


@triton.jit
def _values(
    value_words,
    value_table,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BITS: tl.constexpr,
    group: tl.constexpr,
):
    """Values of 64 tokens of a page, in units of their half-ranges, f16 ``[D_TILE, 64]``."""
    channel, pair = tl.arange(0, D_TILE), tl.arange(0, GROUP // 2)
    words = value_words + channel[:, None] * 8 + (pair % 8)[None, :]
    coded = group_words(8 * D, words, group, BITS, group == 3, (channel < D)[:, None])
    return decode_pairs(coded, group_shift(pair // 8, group, BITS)[None, :], value_table, BITS)


@triton.jit(do_not_specialize=GROWING)
def decode_splits(
    turned,
    sizes,
    key_words,
    key_half_range,
    key_center,
    key_table,
    value_words,
    scales,
    value_table,
    block_table,
    lengths,
    base_positions,
    irregular_positions,
    phase_high,
    phase_low,
    offset_cos,
    offset_sin,
    weights,
    page_max,
    page_range,
    split_out,
    split_max,
    split_sum,
    table_width,
    max_pages,
    weight_tokens,
    score_scale,
    softcap,
    rotary_scaling,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    SCALE_HEADS: tl.constexpr,
    EXACT_SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    VALUE_OUTLIERS: tl.constexpr,
    IRREGULAR: tl.constexpr,
):
    """Program ``(split of pages, h, b)``; splits of exact tokens come before those of pages."""
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    group_head = tl.arange(0, N)
    valid = group_head < G
    state_max = tl.full([N], -float("inf"), tl.float32)
    state_sum = tl.zeros([N], tl.float32)
    state_center = tl.zeros([N], tl.float32)
    state_out = tl.zeros([D_TILE, N], tl.float32)
    row = (batch * H + head).to(tl.int64)
    query_scale = tl.load(sizes + row * GROUP_WIDTH + group_head, mask=valid, other=0.0)
    query_scale *= score_scale
    pages = tl.load(lengths + batch * 3)
    each = tl.cdiv(pages, splits)
    start = split * each
    half_range = key_half_range + head * D
    center = key_center + head * D
    row_weights = weights + row * weight_tokens * G
    row_max = page_max + row * max_pages * G
    for index in range(start, tl.minimum(start + each, pages)):
        entry = tl.load(block_table + batch * table_width + index)
        page = (entry & PAGE_IDS).to(tl.int64)
        length = 256 - (entry >> CUT)
        base = tl.load(base_positions + page)
        queries = turned + (row * max_pages + index) * (D * GROUP_WIDTH)
        page_first = _turned(queries, 0, HALF, HALF_TILE, group_head, GROUP_WIDTH)
        page_second = _turned(queries, HALF, HALF, HALF_TILE, group_head, GROUP_WIDTH)
        page_rest = page_first
        if REST_TILE > 0:
            page_rest = _turned(queries, 2 * HALF, D - 2 * HALF, REST_TILE, group_head, GROUP_WIDTH)
        page_key_words = key_words + (page * H + head) * (K_BITS * 8 * D)
        page_value_words = value_words + (page * H + head) * (V_BITS * 8 * D)
        scale_head = head if SCALE_HEADS > 1 else 0
        page_scales = scales + (page * SCALE_HEADS + scale_head) * 512
        page_weights = row_weights + index * 256 * G
        # One softmax a page: reductions and rescaling cost as much for 64 tokens as for 256.
        scores = ()
        for group in tl.static_range(4):
            # Fences keep the compiler from loading all groups at once, for which there are no
            # registers; where there are, it does better without.
            if D_TILE > 128 or D_TILE > D:
                tl.debug_barrier()
            scores += (
                _scores(
                    page_first, page_second, page_rest, query_scale, page_key_words, half_range,
                    center, key_table, offset_cos, offset_sin, phase_high, phase_low, base,
                    irregular_positions, rotary_scaling, page_weights, length, softcap,
                    group_head, G, D, HALF, HALF_TILE, REST_TILE, K_BITS, SOFTCAP, KEY_OUTLIERS,
                    IRREGULAR, group,
                ),
            )  # fmt: skip
        tl.debug_barrier()
        largest = tl.maximum(tl.maximum(scores[0], scores[1]), tl.maximum(scores[2], scores[3]))
        largest = tl.maximum(state_max, tl.max(largest, axis=0))
        decay = tl.exp2(state_max - largest)
        state_max = largest
        token = tl.arange(0, GROUP)
        widest = tl.zeros([GROUP], tl.float32)
        for group in tl.static_range(4):
            token_range = tl.load(page_scales + 2 * (group * GROUP + token)).to(tl.float32)
            widest = tl.maximum(widest, token_range)
        widest = tl.max(widest, axis=0)
        total = tl.zeros([GROUP, N], tl.float32)
        centers = tl.zeros([GROUP, N], tl.float32)
        added = tl.zeros([D_TILE, N], tl.float32)
        for group in tl.static_range(4):
            place = group * GROUP + token
            weight = tl.exp2(scores[group] - largest[None, :])
            total += weight
            # A value is half_range * z + center of its token: both fold into the weights. The
            # largest half-range of the page is taken out, so that f16 holds at most 1.
            token_range = tl.load(page_scales + 2 * place).to(tl.float32)
            token_center = tl.load(page_scales + 2 * place + 1).to(tl.float32)
            centers += weight * token_center[:, None]
            weight = (weight * (token_range / widest)[:, None]).to(tl.float16)
            if VALUE_OUTLIERS:
                kept = page_weights + place[:, None] * G + group_head[None, :]
                tl.store(kept, weight, mask=valid[None, :])
            tl.debug_barrier()
            values = _values(page_value_words, value_table, D, D_TILE, V_BITS, group)
            added = tl.dot(values, weight, added)
        state_sum = state_sum * decay + tl.sum(total, axis=0)
        state_center = state_center * decay + tl.sum(centers, axis=0)
        state_out = state_out * decay[None, :] + added * widest
        if VALUE_OUTLIERS:
            tl.store(row_max + index * G + group_head, largest, mask=valid)
            tl.store(page_range + row * max_pages + index, widest)
    line = (row * (splits + EXACT_SPLITS) + EXACT_SPLITS + split) * G
    state_out += state_center[None, :]
    write_split(split_out, split_max, split_sum, line, state_out, state_max, state_sum, G, D)
