"""Decode attention, side pass behind the main kernel: what outliers of values add to outputs.

Lists are sorted by channel: a channel adds up to the running sum at its end less that at its
beginning, which is the end of the channel before. So sums at ends are all that is read of a page's
running sums, and differences are taken once, of what all pages add up to.
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia.entry_counts import chunks, slots, steps
from kvq_kernels.nvidia.entry_shares import entry_pointers, high_bytes, load_entry, low_bits
from kvq_kernels.nvidia.entry_sums import (
    as_operand,
    barrier,
    lane_rows,
    running_sums,
    selector,
)
from kvq_kernels.nvidia.half_pairs import multiply
from kvq_kernels.page_entries import GROWING, PAGE_IDS


@gluon.jit
def _products(entry, residual, weights, head, G: gl.constexpr):
    """Residual times weight of its token, f16 ``[32 warps, 4]``; weights are of a warp's page."""
    token = low_bits(entry, 8).to(gl.int64)
    weight = gl.load(weights + (token * G)[:, None] + head, mask=head < G, other=0.0)
    return multiply(weight, residual[:, None])


@gluon.jit(do_not_specialize=GROWING)
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
    value_sums,
    table_width,
    max_pages,
    weight_tokens,
    residual_step,
    H: gl.constexpr,
    G: gl.constexpr,
    GROUP_WIDTH: gl.constexpr,
    D: gl.constexpr,
    CAPACITY: gl.constexpr,
    EXACT_SPLITS: gl.constexpr,
):
    """Program ``(split of pages, h, b)``: add value outliers to weighted values.

    As the portable one (``decode_outliers``), with all channels in one program whose warps take
    pages in turn. ``value_sums`` f32 ``[B, H, splits, warps, slots(CAPACITY, D), WIDTH]`` is where
    lanes leave running sums, WIDTH the query heads of a group rounded up to a multiple of four.
    """
    WARPS: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = 32 * WARPS
    ROWS: gl.constexpr = lane_rows(WARPS)
    TILES: gl.constexpr = (GROUP_WIDTH + 3) // 4
    WIDTH: gl.constexpr = 4 * TILES
    STEPS: gl.constexpr = steps(CAPACITY)
    FIRST: gl.constexpr = (STEPS + 1) // 2
    SLOTS: gl.constexpr = slots(CAPACITY, D)
    PARTS: gl.constexpr = (D + 31) // 32
    split, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    splits = gl.num_programs(0)
    pages = gl.load(lengths + batch * 3)
    each = gl.cdiv(pages, splits)
    first_page = split * each
    last_page = gl.minimum(first_page + each, pages)
    if first_page < last_page:
        thread = gl.arange(0, LANES, layout=gl.SliceLayout(1, ROWS))
        lane, warp = thread % 32, thread // 32
        quad = gl.arange(0, 4, layout=gl.SliceLayout(0, ROWS))[None, :]
        row = (batch * H + head).to(gl.int64)
        line = (row * (splits + EXACT_SPLITS) + EXACT_SPLITS + split) * G
        sums = value_sums + (row * splits + split) * (WARPS * SLOTS * WIDTH)
        warp_sums = sums + (warp * (SLOTS * WIDTH))[:, None] + quad
        upto, minus_own = selector(1, WARPS), selector(-1, WARPS)
        largest = ()
        totals = ()
        for tile in gl.static_range(TILES):
            place = 4 * tile + quad
            largest += (gl.load(split_max + line + place, mask=place < G, other=0.0),)
            none = gl.zeros([LANES, 4], gl.float32, layout=ROWS)
            gl.store(warp_sums + 4 * tile, none, mask=(lane == 0)[:, None])
            for _ in gl.static_range(PARTS):
                totals += (none,)
        for turn in range(first_page, last_page, WARPS):
            # Warps without a page take the last again, and add nothing.
            index = gl.minimum(turn + warp, last_page - 1)
            page = (gl.load(block_table + batch * table_width + index) & PAGE_IDS).to(gl.int64)
            page_line = page * H + head
            page_weights = weights + ((row * weight_tokens + index * 256) * G)[:, None]
            unit = gl.load(page_range + row * max_pages + index) * residual_step
            unit = gl.where(turn + warp < last_page, unit, 0.0)[:, None]
            barrier()
            for chunk in range(chunks(CAPACITY)):
                first = chunk * (32 * STEPS)
                if chunks(CAPACITY) > 1:
                    barrier()
                entries = entry_pointers(lists + page_line * CAPACITY, first, lane, CAPACITY)
                for tile in gl.static_range(TILES):
                    heads = 4 * tile + quad
                    xs = ()
                    for i in gl.static_range(FIRST):
                        entry = load_entry(entries, i, CAPACITY)
                        if FIRST + i < STEPS:
                            other = load_entry(entries, FIRST + i, CAPACITY)
                            residual, residual_other = high_bytes(entry, other)
                            y = _products(other, residual_other, page_weights, heads, G)
                        else:
                            residual = (entry >> 8).to(gl.float16)
                            y = gl.zeros([LANES, 4], gl.float16, layout=ROWS)
                        x = _products(entry, residual, page_weights, heads, G)
                        xs += (as_operand(x, y, WARPS),)
                    running_sums(
                        xs, upto, minus_own, sums + 4 * tile, first, CAPACITY, WIDTH, SLOTS, WARPS
                    )
            barrier()
            before = totals
            totals = ()
            for tile in gl.static_range(TILES):
                heads = 4 * tile + quad
                met = page_max + ((row * max_pages + index) * G)[:, None] + heads
                met = gl.load(met, mask=heads < G, other=0.0)
                factor = gl.exp2(met - largest[tile]) * unit
                for part in gl.static_range(PARTS):
                    channel = part * 32 + lane
                    end = offsets + page_line * (D + 1) + channel + 1
                    if D % 32 == 0:
                        end = gl.load(end).to(gl.int64)
                    else:
                        end = gl.load(end, mask=channel < D, other=0).to(gl.int64)
                    upto_end = gl.load(warp_sums + (end * WIDTH)[:, None] + 4 * tile)
                    totals += (before[tile * PARTS + part] + upto_end * factor,)
        barrier()
        for tile in gl.static_range(TILES):
            for part in gl.static_range(PARTS):
                channel = part * 32 + lane
                place = warp_sums + ((1 + channel) * WIDTH)[:, None] + 4 * tile
                gl.store(place, totals[tile * PARTS + part], mask=(channel < D)[:, None])
        barrier()
        for part in gl.static_range((D + LANES - 1) // LANES):
            channel = (part * LANES + thread)[:, None]
            for tile in gl.static_range(TILES):
                heads = 4 * tile + quad
                mask = (channel < D) & (heads < G)
                place = split_out + line * D + heads * D + channel
                result = gl.load(place, mask=mask, other=0.0)
                for each_warp in gl.static_range(WARPS):
                    upto_begin = sums + (each_warp * SLOTS + channel) * WIDTH + heads
                    result += gl.load(upto_begin + WIDTH, mask=channel < D, other=0.0)
                    result -= gl.load(upto_begin, mask=channel < D, other=0.0)
                gl.store(place, result, mask=mask)
