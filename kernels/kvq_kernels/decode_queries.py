"""Decode attention, first kernel: queries turned back by each page's base position.

With the query turned back, keys of a page need to be turned by their place in it only:
``q . R(base + u) k = (R(-base) q) . R(u) k``. All later kernels read what is left here.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kvq_kernels.page_entries import GROWING, PAGE_IDS
from kvq_kernels.phases import cos_sin

TURN_PAGES: Final = tl.constexpr(8)
"""Pages of a program: what is the same for all of them is done once."""


@triton.jit
def _query(query, FIRST: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, valid, D):
    """Queries f32 ``[N, TILE]``, zero where there is none."""
    place = tl.arange(0, TILE)
    head = tl.arange(0, valid.shape[0])
    mask = valid[:, None] & (place < COUNT)[None, :]
    return tl.load(query + head[:, None] * D + FIRST + place[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _keep(
    queries,
    numbers,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    channel_stride,
    head_stride,
):
    place = tl.arange(0, TILE)
    head = tl.arange(0, numbers.shape[0])
    tl.store(
        queries + (FIRST + place)[None, :] * channel_stride + head[:, None] * head_stride,
        numbers.to(tl.float16),
        mask=(place < COUNT)[None, :],
    )


@triton.jit(do_not_specialize=GROWING)
def turn_queries(
    query,
    block_table,
    lengths,
    base_positions,
    phase_high,
    phase_low,
    turned,
    page_queries,
    sizes,
    table_width,
    max_pages,
    H: tl.constexpr,
    G: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    IRREGULAR: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """Program ``(TURN_PAGES pages of the row, h, b)``.

    Writes queries divided by their largest number so that f16 holds them, and that number,
    ``sizes`` f32 ``[B, H, GROUP_WIDTH]``. The width is G, rounded up to a power of two; heads
    behind G are 0. Queries go to ``turned`` f16 ``[B, H, max_pages, D, GROUP_WIDTH]`` or to
    ``page_queries`` ``[B, H, max_pages, GROUP_WIDTH, D]`` or to both, as kernels need them. With
    IRREGULAR they are not turned.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = part * TURN_PAGES
    pages = tl.minimum(start + TURN_PAGES, tl.load(lengths + batch * 3))
    if start < pages:
        row = batch * H + head
        query += row * G * D
        group_head = tl.arange(0, GROUP_WIDTH)
        valid = group_head < G
        largest = tl.zeros([GROUP_WIDTH], tl.float32)
        first = tl.zeros([GROUP_WIDTH, HALF_TILE], tl.float32)
        second = tl.zeros([GROUP_WIDTH, HALF_TILE], tl.float32)
        pair = tl.arange(0, HALF_TILE)
        if HALF > 0:
            first = _query(query, 0, HALF, HALF_TILE, valid, D)
            second = _query(query, HALF, HALF, HALF_TILE, valid, D)
            largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
            pair = tl.minimum(pair, HALF - 1)
        rest = tl.zeros([GROUP_WIDTH, 16], tl.float32)
        if REST_TILE > 0:
            rest = _query(query, 2 * HALF, D - 2 * HALF, REST_TILE, valid, D)
            largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1))
        largest = tl.where(largest > 0, largest, 1.0)
        if part == 0:
            tl.store(sizes + row * GROUP_WIDTH + group_head, largest)
        first /= largest[:, None]
        second /= largest[:, None]
        rest /= largest[:, None]
        high, low = tl.load(phase_high + pair), tl.load(phase_low + pair)
        FIRST: tl.constexpr = 2 * HALF
        for index in range(start, pages):
            place = (row.to(tl.int64) * max_pages + index) * (D * GROUP_WIDTH)
            if HALF > 0:
                if IRREGULAR:
                    turned_first, turned_second = first, second
                else:
                    page = tl.load(block_table + batch * table_width + index) & PAGE_IDS
                    base = tl.load(base_positions + page.to(tl.int64))
                    cos, sin = cos_sin(tl.full([HALF_TILE], base, tl.int32), high, low)
                    cos, sin = cos[None, :], sin[None, :]
                    turned_first = first * cos + second * sin
                    turned_second = second * cos - first * sin
                if BY_CHANNEL:
                    own = turned + place
                    _keep(own, turned_first, 0, HALF, HALF_TILE, GROUP_WIDTH, 1)
                    _keep(own, turned_second, HALF, HALF, HALF_TILE, GROUP_WIDTH, 1)
                if BY_HEAD:
                    own = page_queries + place
                    _keep(own, turned_first, 0, HALF, HALF_TILE, 1, D)
                    _keep(own, turned_second, HALF, HALF, HALF_TILE, 1, D)
            if REST_TILE > 0:
                if BY_CHANNEL:
                    _keep(turned + place, rest, FIRST, D - FIRST, REST_TILE, GROUP_WIDTH, 1)
                if BY_HEAD:
                    _keep(page_queries + place, rest, FIRST, D - FIRST, REST_TILE, 1, D)
