"""Decode attention, side pass before the main kernel: what outliers of keys add to scores."""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia.entry_counts import chunks, slots, steps
from kvq_kernels.nvidia.entry_shares import entry_pointers, load_entry
from kvq_kernels.nvidia.entry_sums import as_operand, barrier, running_sums, selector
from kvq_kernels.nvidia.entry_tokens import LANE, before_lane, mark_tokens
from kvq_kernels.nvidia.turned_entries import (
    ROWS,
    keep_table,
    load_heads,
    scaled_half_ranges,
    turned_entry,
)
from kvq_kernels.page_entries import GROWING, PAGE_IDS


@gluon.jit(do_not_specialize=GROWING)
def key_outlier_scores(
    turned,
    sizes,
    pools,
    counts,
    half_range,
    block_table,
    lengths,
    offset_turns,
    weights,
    key_sums,
    key_marks,
    key_queries,
    table_width,
    max_pages,
    weight_tokens,
    score_scale,
    residual_step,
    H: gl.constexpr,
    G: gl.constexpr,
    GROUP_WIDTH: gl.constexpr,
    D: gl.constexpr,
    HALF: gl.constexpr,
    CAPACITY: gl.constexpr,
    CHANNEL_BITS: gl.constexpr,
):
    """Program ``(share of pages, h, b)``, one warp: what key outliers add to scores.

    Writes f16 ``[256, G]`` at each page's place in ``weights``, as the portable one
    (``decode_outliers``), of pages that do not jump and heads that are rotated whole; D is a power
    of two. A program takes every n-th page of a row, so that what it keeps beside stays in
    the caches. WIDTH are the query heads of a group, rounded up to a multiple of four.

    Args beyond the portable one's:
        offset_turns: f16 ``[256, HALF, 2]``, ``offset_cos`` and ``offset_sin`` side by side.
        key_sums: f32 ``[B, H, programs, slots(CAPACITY), WIDTH]``.
        key_marks: i32 ``[B, H, programs, slots(CAPACITY) - 1]``.
        key_queries: f16 ``[B, H, programs, WIDTH / 4, D, 2, 4]``.
    """
    gl.static_assert(gl.num_warps() == 1)
    gl.static_assert(2 * HALF == D and (HALF & (HALF - 1)) == 0)
    TILES: gl.constexpr = (GROUP_WIDTH + 3) // 4
    WIDTH: gl.constexpr = 4 * TILES
    STEPS: gl.constexpr = steps(CAPACITY)
    FIRST: gl.constexpr = (STEPS + 1) // 2
    SLOTS: gl.constexpr = slots(CAPACITY)
    slot, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    programs = gl.num_programs(0)
    pages = gl.load(lengths + batch * 3)
    if slot < pages:
        lane = gl.arange(0, 32, layout=LANE)
        quad = gl.arange(0, 4, layout=gl.SliceLayout(0, ROWS))[None, :]
        row = (batch * H + head).to(gl.int64)
        own = row * programs + slot
        sums = key_sums + own * (SLOTS * WIDTH)
        marks = key_marks + own * (SLOTS - 1)
        table = key_queries + own * (2 * D * WIDTH)
        upto, minus_own = selector(1, 1), selector(-1, 1)
        gl.store(sums + lane, gl.zeros([32], gl.float32, layout=LANE), mask=lane < WIDTH)
        factors = ()
        for tile in gl.static_range(TILES):
            scale = load_heads(sizes + row * GROUP_WIDTH, 4 * tile + quad, GROUP_WIDTH)
            scale *= score_scale * residual_step
            factors += (scaled_half_ranges(half_range + head * D, scale, lane, D),)
        for index in range(slot, pages, programs):
            page = (gl.load(block_table + batch * table_width + index) & PAGE_IDS).to(gl.int64)
            line = page * H + head
            queries = turned + (row * max_pages + index) * (D * GROUP_WIDTH)
            for tile in gl.static_range(TILES):
                own_table, heads = table + tile * (8 * D), 4 * tile + quad
                keep_table(own_table, queries, factors[tile], lane, heads, GROUP_WIDTH, D)
            ends = mark_tokens(marks, counts + line * 256, lane, SLOTS - 1, HALF)
            barrier()
            latest = gl.zeros([32], gl.int32, layout=LANE)
            for chunk in range(chunks(CAPACITY)):
                begin = chunk * (32 * STEPS)
                if chunks(CAPACITY) > 1:
                    barrier()
                tokens = (gl.load(marks + begin + lane * STEPS),)
                for i in gl.static_range(1, STEPS):
                    mark = gl.load(marks + begin + lane * STEPS + i)
                    tokens += (gl.maximum(tokens[i - 1], mark),)
                before = before_lane(tokens[STEPS - 1], lane, True)
                if chunks(CAPACITY) > 1:
                    before = gl.maximum(before, latest)
                    latest = gl.maximum(latest, gl.max(tokens[STEPS - 1], 0))
                entries = entry_pointers(pools + line * CAPACITY, begin, lane, CAPACITY)
                for tile in gl.static_range(TILES):
                    own_table = table + tile * (8 * D)
                    xs = ()
                    for i in gl.static_range(FIRST):
                        entry = load_entry(entries, i, CAPACITY)
                        token = gl.maximum(before, tokens[i])
                        x = turned_entry(entry, token, offset_turns, own_table, HALF, CHANNEL_BITS)
                        y = gl.zeros([32, 4], gl.float16, layout=ROWS)
                        if FIRST + i < STEPS:
                            entry = load_entry(entries, FIRST + i, CAPACITY)
                            token = gl.maximum(before, tokens[FIRST + i])
                            y = turned_entry(
                                entry, token, offset_turns, own_table, HALF, CHANNEL_BITS
                            )
                        xs += (as_operand(x, y, 1),)
                    running_sums(
                        xs, upto, minus_own, sums + 4 * tile, begin, CAPACITY, WIDTH, SLOTS, 1
                    )
            barrier()
            kept = weights + ((row * weight_tokens + index * 256 + 8 * lane) * G)[:, None]
            for tile in gl.static_range(TILES):
                heads = 4 * tile + quad
                upto_here = gl.load(sums + (ends[0].to(gl.int64) * WIDTH)[:, None] + heads)
                for k in gl.static_range(8):
                    upto_next = gl.load(sums + (ends[k + 1].to(gl.int64) * WIDTH)[:, None] + heads)
                    scores = (upto_next - upto_here).to(gl.float16)
                    gl.store(kept + k * G + heads, scores, mask=heads < G)
                    upto_here = upto_next
