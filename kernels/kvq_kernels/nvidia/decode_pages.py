"""Decode attention over packed pages for NVIDIA GPUs from sm_80 on: one warp reads a run of pages.

The same bytes, scratch and results as ``decode_splits``, which other devices and models take:
codes are looked up in registers, in the order of matrix operands (``lookups``, ``layouts``), and
no number of the cache passes through memory again. Scores change lanes once, through shared memory,
so that the softmax of a page wastes no lanes on heads that a group does not have.
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvq_kernels.nvidia import layouts
from kvq_kernels.nvidia.half_pairs import to_floats
from kvq_kernels.nvidia.layouts import (
    CHANNELS,
    CHUNK,
    HEADS,
    KEY_WORDS,
    MMA,
    PLAIN,
    QUERIES,
    VALUE_WORDS,
    A,
    B,
    lookup_words,
    place_of,
    query_operand,
    reinterpret,
    sums_of_lanes,
    token_of_row,
)
from kvq_kernels.nvidia.page_scores import load_scales, write_page_scores
from kvq_kernels.nvidia.page_values import weighted_values
from kvq_kernels.nvidia.prefetch import prefetch
from kvq_kernels.page_entries import CUT, GROWING, PAGE_IDS
from kvq_kernels.scores import soft_capped


@gluon.jit
def _all_heads(numbers, WIDTH: gl.constexpr):
    """A number for each head of a group, ``[WIDTH]``, for all columns of B, ``[1, HEADS]``."""
    for _ in gl.static_range(4 - WIDTH.bit_length()):
        numbers = gl.reshape(gl.permute(gl.join(numbers, numbers), [1, 0]), [2 * numbers.shape[0]])
    return gl.convert_layout(numbers, gl.SliceLayout(0, MMA))[None, :]


@gluon.jit(do_not_specialize=GROWING)
def decode_pages(
    page_queries,
    sizes,
    key_words,
    key_scale,
    key_zero,
    key_lookup,
    value_words,
    scales,
    value_lookup,
    value_step,
    value_offset,
    block_table,
    lengths,
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
    H: gl.constexpr,
    G: gl.constexpr,
    GROUP_WIDTH: gl.constexpr,
    D: gl.constexpr,
    K_BITS: gl.constexpr,
    V_BITS: gl.constexpr,
    SCALE_HEADS: gl.constexpr,
    EXACT_SPLITS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    KEY_OUTLIERS: gl.constexpr,
    VALUE_OUTLIERS: gl.constexpr,
):
    """Program ``(split of pages, h, b)``; splits of exact tokens come before those of pages.

    Words, and f16 ``key_scale``, ``key_zero``, ``offset_cos``, ``offset_sin`` and ``scales``, are
    read as i32. ``page_queries`` is f16 ``[B, H, max_pages, GROUP_WIDTH, D]``; lookups are those of
    ``tables.LookupTables``.
    """
    HALF: gl.constexpr = D // 2
    CHUNKS: gl.constexpr = D // (4 * CHUNK)
    KEY_TABLE: gl.constexpr = 2 if K_BITS == 2 else 4
    VALUE_TABLE: gl.constexpr = 1 << (V_BITS - 2)
    ROWS: gl.constexpr = layouts.page_scores(GROUP_WIDTH)
    split, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    splits = gl.num_programs(0)
    row = (batch * H + head).to(gl.int64)
    pages = gl.load(lengths + batch * 3)
    each = gl.cdiv(pages, splits)
    start = split * each
    end = gl.minimum(start + each, pages)
    last = end - 1

    # What all pages share.
    key_row = token_of_row(gl.arange(0, 16, gl.SliceLayout(1, KEY_WORDS)))[:, None]
    pair = place_of(gl.arange(0, CHUNK, gl.SliceLayout(0, KEY_WORDS)), HALF // 2, 4)[None, :]
    key_table = lookup_words(key_lookup, KEY_TABLE, 16, KEY_WORDS)
    key_scales = ()
    if CHUNKS > 2:
        # Too many to stay in registers.
        key_scales = (key_scale + head * HALF + pair, key_zero + head * HALF + pair)
    else:
        for chunk in gl.static_range(CHUNKS):
            first = head * HALF + 4 * chunk + pair
            key_scales += (load_scales(key_scale + first, key_zero + first, D),)
    key_place = key_row * HALF + pair
    offset_cos += key_row * (HALF // 2) + pair
    offset_sin += key_row * (HALF // 2) + pair
    value_table = lookup_words(value_lookup, VALUE_TABLE, CHANNELS, VALUE_WORDS)
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(1, VALUE_WORDS))[:, None]
    value_place = channel * 8 + gl.arange(0, 8, gl.SliceLayout(0, VALUE_WORDS))[None, :]
    query_head = gl.minimum(gl.arange(0, HEADS, gl.SliceLayout(0, QUERIES)), G - 1)[None, :]
    query_place = place_of(gl.arange(0, 2 * CHUNK, gl.SliceLayout(1, QUERIES)), HALF, 8)[:, None]
    query_place += query_head * D
    token = token_of_row(gl.arange(0, 256, gl.SliceLayout(1, ROWS)))
    group_head = gl.arange(0, GROUP_WIDTH, gl.SliceLayout(0, ROWS))
    valid = group_head < G
    query_scale = gl.load(sizes + row * GROUP_WIDTH + group_head) * score_scale
    weight_place = token[:, None] * G + group_head[None, :]
    ones = gl.full([16, 16], 1.0, gl.float16, A)

    scores = gl.allocate_shared_memory(gl.float32, [4, 64, HEADS], PLAIN)
    page_scores = reinterpret(scores, gl.float32, [256, HEADS], PLAIN).slice(0, GROUP_WIDTH, 1)
    shared_weights = gl.allocate_shared_memory(gl.float16, [16, 16, HEADS], PLAIN)
    page_weights = reinterpret(shared_weights, gl.float16, [256, HEADS], PLAIN).slice(
        0, GROUP_WIDTH, 1
    )

    largest = gl.full([GROUP_WIDTH], -float("inf"), gl.float32, gl.SliceLayout(0, ROWS))
    total = gl.zeros([32, GROUP_WIDTH], gl.float32, ROWS)
    centers = gl.zeros([32, GROUP_WIDTH], gl.float32, ROWS)
    # In units of the last page's widest half-range.
    sums = ()
    for _ in gl.static_range(D // CHANNELS):
        sums += (gl.zeros([CHANNELS, HEADS], gl.float32, MMA),)
    mass = gl.zeros([16, HEADS], gl.float32, MMA)
    unit = 1.0

    for index in range(start, end):
        entry = gl.load(block_table + batch * table_width + index)
        page = (entry & PAGE_IDS).to(gl.int64)
        length = 256 - (entry >> CUT)
        after = gl.load(block_table + batch * table_width + gl.minimum(index + 1, last))
        after = ((after & PAGE_IDS).to(gl.int64) * H + head) * (8 * D)
        prefetch(key_words + after * K_BITS, K_BITS * 8 * D)
        prefetch(value_words + after * V_BITS, V_BITS * 8 * D)
        own_queries = page_queries + (row * max_pages + index) * (D * GROUP_WIDTH) + query_place
        queries = ()
        for chunk in gl.static_range(CHUNKS):
            at = own_queries + 8 * chunk
            queries += ((query_operand(gl.load(at)), query_operand(gl.load(at + HALF))),)
        own_words = key_words + (page * H + head) * (K_BITS * 8 * D) + key_place
        write_page_scores(
            own_words, offset_cos, offset_sin, key_table, key_scales, queries, scores, D, K_BITS
        )

        score = page_scores.load(ROWS) * query_scale[None, :]
        own_weights = weights + (row * weight_tokens + index * 256) * G + weight_place
        if KEY_OUTLIERS:
            score += gl.load(own_weights, mask=valid[None, :], other=0.0).to(gl.float32)
        if SOFTCAP:
            score = soft_capped(score, softcap)
        score = gl.where((token < length)[:, None], score, -float("inf"))
        met = largest
        largest = gl.maximum(met, gl.max(score, axis=0))
        decay = gl.exp2(met - largest)
        weight = gl.exp2(score - largest[None, :])
        scale_head = head if SCALE_HEADS > 1 else 0
        own_scales = scales + (page * SCALE_HEADS + scale_head) * 256 + token
        half_range, center = to_floats(gl.load(own_scales))
        widest = gl.max(half_range, axis=0)
        total = total * decay[None, :] + sums_of_lanes(weight, GROUP_WIDTH, ROWS)
        weighted = sums_of_lanes(weight * center[:, None], GROUP_WIDTH, ROWS)
        centers = centers * decay[None, :] + weighted
        # A value is half_range * z + center of its token: both fold into the weights. The largest
        # half-range of the page is taken out, so that f16 holds at most 1.
        half_weight = (weight * (half_range * (1.0 / widest))[:, None]).to(gl.float16)
        if VALUE_OUTLIERS:
            gl.store(own_weights, half_weight, mask=valid[None, :])
            line = row * max_pages + index
            gl.store(page_max + line * G + group_head, largest, mask=valid)
            gl.store(page_range + line, widest)
        page_weights.store(half_weight)

        operands = ()
        page_mass = gl.zeros([16, HEADS], gl.float32, MMA)
        for subset in gl.static_range(16):
            operands += (shared_weights.index(subset).load(B),)
            # The sum of the weights as they were rounded.
            page_mass = mma_v2(ones, operands[subset], page_mass)
        factor = _all_heads(decay * (unit / widest), GROUP_WIDTH)
        mass = mass * factor + page_mass
        own_words = value_words + (page * H + head) * (V_BITS * 8 * D) + value_place
        added = ()
        for part in gl.static_range(D // CHANNELS):
            found = weighted_values(
                own_words + part * CHANNELS * 8, value_table, operands, D, V_BITS
            )
            added += (sums[part] * factor + found,)
        sums = added
        unit = widest

    # Numbers were 1024 + level; an entry is offset + step * level.
    offset = gl.max(mass, axis=0)[None, :] * (unit * (value_offset - 1024.0 * value_step))
    offset += _all_heads(gl.sum(centers, axis=0), GROUP_WIDTH)
    line = (row * (splits + EXACT_SPLITS) + EXACT_SPLITS + split) * G
    gl.store(split_max + line + group_head, largest, mask=valid)
    gl.store(split_sum + line + group_head, gl.sum(total, axis=0), mask=valid)
    head_column = gl.arange(0, HEADS, gl.SliceLayout(0, MMA))[None, :]
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(1, MMA))[:, None]
    for part in gl.static_range(D // CHANNELS):
        gl.store(
            split_out + (line + head_column) * D + part * CHANNELS + channel,
            sums[part] * (unit * value_step) + offset,
            mask=head_column < G,
        )
