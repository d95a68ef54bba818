"""What limits the fast path of decoding: its parts, each by itself, in kernels of one warp.

Each is ``kvq_kernels.nvidia.decode_pages`` with something left out: the same grid, pages, block
table, loads, loops and lookups, from the same functions. What is left is folded into one small
result a program, so that the compiler cannot drop it, and is checked in
``tests/benchmarks/test_ceiling_kernels.py``.

* ``unpack_pages``: loads and lookups of keys and values, xor of what was found;
* ``score_pages``: keys: lookups, rotations, products with queries; scores are added up;
* ``weigh_pages``: values: lookups, products with weights that are all 1.

Every page counts as whole, cut or not. Arguments are those of ``decode_pages`` of the same names.
D is 64 or 128.
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia import layouts
from kvq_kernels.nvidia.layouts import (
    CHANNELS,
    CHUNK,
    HEADS,
    KEY_WORDS,
    MMA,
    PLAIN,
    QUERIES,
    VALUE_WORDS,
    B,
    lookup_words,
    place_of,
    query_operand,
    reinterpret,
    sums_of_lanes,
    token_of_row,
)
from kvq_kernels.nvidia.lookups import key_numbers, selectors, spare_words, value_numbers
from kvq_kernels.nvidia.page_scores import write_page_scores
from kvq_kernels.nvidia.page_values import weighted_values
from kvq_kernels.nvidia.prefetch import prefetch
from kvq_kernels.page_entries import PAGE_IDS


@gluon.jit
def _share(lengths, batch):
    """First page of a program, and the one behind its last."""
    splits = gl.num_programs(0)
    pages = gl.load(lengths + batch * 3)
    each = gl.cdiv(pages, splits)
    start = gl.program_id(0) * each
    return start, gl.minimum(start + each, pages)


@gluon.jit
def _program(H: gl.constexpr):
    """Place of a program's result: of ``[B, H, splits]``."""
    row = gl.program_id(2) * H + gl.program_id(1)
    return row * gl.num_programs(0) + gl.program_id(0)


@gluon.jit
def _page(block_table, batch, table_width, index):
    """Place in the pool, i64."""
    return (gl.load(block_table + batch * table_width + index) & PAGE_IDS).to(gl.int64)


@gluon.jit
def _key_places(HALF: gl.constexpr):
    """Token of each row and word of each column of a key tile, i32 ``[16, 1]``, ``[1, CHUNK]``."""
    row = token_of_row(gl.arange(0, 16, gl.SliceLayout(1, KEY_WORDS)))[:, None]
    pair = place_of(gl.arange(0, CHUNK, gl.SliceLayout(0, KEY_WORDS)), HALF // 2, 4)[None, :]
    return row, pair


@gluon.jit
def _value_places():
    """Words of a value tile, i32 ``[CHANNELS, 8]``."""
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(1, VALUE_WORDS))[:, None]
    return channel * 8 + gl.arange(0, 8, gl.SliceLayout(0, VALUE_WORDS))[None, :]


@gluon.jit
def _fold_key_words(folded, at, table, GROUP_OF_PLANE: gl.constexpr, SPARE: gl.constexpr,
                    PLANE: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    words = gl.load(at)
    if SPARE:
        words = spare_words(words, gl.load(at + PLANE), gl.load(at + 2 * PLANE))
    selector = selectors(words, GROUP_OF_PLANE, BITS)
    for part in gl.static_range(2):
        numbers = key_numbers(words, selector[part], table, part, BITS)
        folded = folded ^ numbers[0] ^ numbers[1]
    return folded


@gluon.jit
def _fold_key_group(folded, at, table, GROUP_OF_PLANE: gl.constexpr, SPARE: gl.constexpr,
                    D: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    """Keys of 64 tokens, a chunk of both rotary halves at a time."""
    SECOND: gl.constexpr = D // 4
    for chunk in gl.static_range(SECOND // CHUNK):
        for half in gl.static_range(2):
            folded = _fold_key_words(
                folded, at + half * SECOND + 4 * chunk, table, GROUP_OF_PLANE, SPARE, 8 * D, BITS
            )
    return folded


@gluon.jit
def _fold_keys(folded, words, table, D: gl.constexpr, BITS: gl.constexpr):
    """Keys of a page, in the loops of ``write_page_scores``."""
    for plane in range(BITS):
        at = words + plane * (8 * D)
        if BITS == 2:
            for half in gl.static_range(2):
                folded = _fold_key_group(folded, at, table, half, False, D, BITS)
        else:
            folded = _fold_key_group(folded, at, table, 0, False, D, BITS)
    if BITS == 3:
        folded = _fold_key_group(folded, words, table, 0, True, D, BITS)
    return folded


@gluon.jit
def _fold_value_group(folded, words, table, GROUP_OF_PLANE: gl.constexpr, BITS: gl.constexpr):
    selector = selectors(words, GROUP_OF_PLANE, BITS)
    for part in gl.static_range(2):
        numbers = value_numbers(words, selector[part], table, part, BITS)
        folded = folded ^ numbers[0] ^ numbers[1]
    return folded


@gluon.jit
def _fold_values(folded, words, table, D: gl.constexpr, BITS: gl.constexpr):
    """CHANNELS channels of a page's values, in the order of ``weighted_values``."""
    PLANE: gl.constexpr = 8 * D
    first = gl.load(words)
    second = gl.load(words + PLANE)
    folded = _fold_value_group(folded, first, table, 0, BITS)
    if BITS == 2:
        folded = _fold_value_group(folded, first, table, 1, BITS)
        folded = _fold_value_group(folded, second, table, 0, BITS)
        folded = _fold_value_group(folded, second, table, 1, BITS)
    else:
        third = gl.load(words + 2 * PLANE)
        folded = _fold_value_group(folded, second, table, 0, BITS)
        folded = _fold_value_group(folded, third, table, 0, BITS)
        fourth = spare_words(first, second, third) if BITS == 3 else gl.load(words + 3 * PLANE)
        folded = _fold_value_group(folded, fourth, table, 0, BITS)
    return folded


@gluon.jit
def unpack_pages(
    key_words,
    key_lookup,
    value_words,
    value_lookup,
    block_table,
    lengths,
    folded,
    table_width,
    H: gl.constexpr,
    D: gl.constexpr,
    K_BITS: gl.constexpr,
    V_BITS: gl.constexpr,
):
    """Xor of all pairs of numbers that a program looks up, i32 ``[B, H, splits]``, two f16 each."""
    head, batch = gl.program_id(1), gl.program_id(2)
    start, end = _share(lengths, batch)
    key_row, pair = _key_places(D // 2)
    key_place = key_row * (D // 2) + pair
    key_table = lookup_words(key_lookup, 2 if K_BITS == 2 else 4, 16, KEY_WORDS)
    value_table = lookup_words(value_lookup, 1 << (V_BITS - 2), CHANNELS, VALUE_WORDS)
    value_place = _value_places()
    keys = gl.zeros([16, CHUNK], gl.int32, KEY_WORDS)
    values = gl.zeros([CHANNELS, 8], gl.int32, VALUE_WORDS)
    for index in range(start, end):
        place = (_page(block_table, batch, table_width, index) * H + head) * (8 * D)
        after = _page(block_table, batch, table_width, gl.minimum(index + 1, end - 1))
        after = (after * H + head) * (8 * D)
        prefetch(key_words + after * K_BITS, K_BITS * 8 * D)
        prefetch(value_words + after * V_BITS, V_BITS * 8 * D)
        keys = _fold_keys(keys, key_words + place * K_BITS + key_place, key_table, D, K_BITS)
        own_words = value_words + place * V_BITS + value_place
        for part in gl.static_range(D // CHANNELS):
            values = _fold_values(values, own_words + part * CHANNELS * 8, value_table, D, V_BITS)
    both = gl.xor_sum(gl.xor_sum(keys, 1), 0) ^ gl.xor_sum(gl.xor_sum(values, 1), 0)
    gl.store(folded + _program(H), both)


@gluon.jit
def score_pages(
    page_queries,
    key_words,
    key_scale,
    key_zero,
    key_lookup,
    block_table,
    lengths,
    offset_cos,
    offset_sin,
    folded,
    table_width,
    max_pages,
    H: gl.constexpr,
    G: gl.constexpr,
    GROUP_WIDTH: gl.constexpr,
    D: gl.constexpr,
    K_BITS: gl.constexpr,
):
    """Sums of a program's scores, f32 ``[B, H, splits, G]``: of keys and ``page_queries``."""
    HALF: gl.constexpr = D // 2
    CHUNKS: gl.constexpr = D // (4 * CHUNK)
    ROWS: gl.constexpr = layouts.page_scores(GROUP_WIDTH)
    head, batch = gl.program_id(1), gl.program_id(2)
    row = (batch * H + head).to(gl.int64)
    start, end = _share(lengths, batch)
    key_row, pair = _key_places(HALF)
    key_table = lookup_words(key_lookup, 2 if K_BITS == 2 else 4, 16, KEY_WORDS)
    key_scales = ()
    for chunk in gl.static_range(CHUNKS):
        first = head * HALF + 4 * chunk + pair
        second = first + HALF // 2
        key_scales += (
            (
                gl.load(key_scale + first),
                gl.load(key_zero + first),
                gl.load(key_scale + second),
                gl.load(key_zero + second),
            ),
        )
    offset_cos += key_row * (HALF // 2) + pair
    offset_sin += key_row * (HALF // 2) + pair
    query_head = gl.minimum(gl.arange(0, HEADS, gl.SliceLayout(0, QUERIES)), G - 1)[None, :]
    query_place = place_of(gl.arange(0, 2 * CHUNK, gl.SliceLayout(1, QUERIES)), HALF, 8)[:, None]
    query_place += query_head * D
    scores = gl.allocate_shared_memory(gl.float32, [4, 64, HEADS], PLAIN)
    page_scores = reinterpret(scores, gl.float32, [256, HEADS], PLAIN).slice(0, GROUP_WIDTH, 1)
    sums = gl.zeros([32, GROUP_WIDTH], gl.float32, ROWS)
    for index in range(start, end):
        place = (_page(block_table, batch, table_width, index) * H + head) * (K_BITS * 8 * D)
        after = _page(block_table, batch, table_width, gl.minimum(index + 1, end - 1))
        prefetch(key_words + (after * H + head) * (K_BITS * 8 * D), K_BITS * 8 * D)
        own_queries = page_queries + (row * max_pages + index) * (D * GROUP_WIDTH) + query_place
        queries = ()
        for chunk in gl.static_range(CHUNKS):
            at = own_queries + 8 * chunk
            queries += ((query_operand(gl.load(at)), query_operand(gl.load(at + HALF))),)
        own_words = key_words + place + key_row * HALF + pair
        write_page_scores(
            own_words, offset_cos, offset_sin, key_table, key_scales, queries, scores, D, K_BITS
        )
        sums += sums_of_lanes(page_scores.load(ROWS), GROUP_WIDTH, ROWS)
    group_head = gl.arange(0, GROUP_WIDTH, gl.SliceLayout(0, ROWS))
    gl.store(folded + _program(H) * G + group_head, gl.sum(sums, axis=0), mask=group_head < G)


@gluon.jit
def weigh_pages(
    value_words,
    value_lookup,
    block_table,
    lengths,
    folded,
    table_width,
    H: gl.constexpr,
    D: gl.constexpr,
    V_BITS: gl.constexpr,
):
    """Sums of a program's ``1024 + level``, f32 ``[B, H, splits, D]``: weights of 1, all heads."""
    head, batch = gl.program_id(1), gl.program_id(2)
    start, end = _share(lengths, batch)
    value_table = lookup_words(value_lookup, 1 << (V_BITS - 2), CHANNELS, VALUE_WORDS)
    value_place = _value_places()
    # Where a page's weights would be.
    shared_weights = gl.allocate_shared_memory(gl.float16, [16, 16, HEADS], PLAIN)
    for subset in gl.static_range(16):
        shared_weights.index(subset).store(gl.full([16, HEADS], 1.0, gl.float16, B))
    sums = ()
    for _ in gl.static_range(D // CHANNELS):
        sums += (gl.zeros([CHANNELS, HEADS], gl.float32, MMA),)
    for index in range(start, end):
        place = (_page(block_table, batch, table_width, index) * H + head) * (V_BITS * 8 * D)
        after = _page(block_table, batch, table_width, gl.minimum(index + 1, end - 1))
        prefetch(value_words + (after * H + head) * (V_BITS * 8 * D), V_BITS * 8 * D)
        operands = ()
        for subset in gl.static_range(16):
            operands += (shared_weights.index(subset).load(B),)
        own_words = value_words + place + value_place
        added = ()
        for part in gl.static_range(D // CHANNELS):
            found = weighted_values(
                own_words + part * CHANNELS * 8, value_table, operands, D, V_BITS
            )
            added += (sums[part] + found,)
        sums = added
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(1, MMA))
    for part in gl.static_range(D // CHANNELS):
        # All heads have the same weights; which one is left is not known where they are summed.
        place = folded + _program(H) * D + part * CHANNELS + channel
        gl.store(place, gl.max(sums[part], axis=1))
