"""Kernel that chooses which outlier candidates a page keeps and writes its pools.

What ``kvq_formats.outliers.keep_largest`` and ``pack_entries`` do, for keys (a row is a token, a
column a channel) and values (a row is a channel, a column a token) alike.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 4096
"""Candidates that a program reads at a time; 32 a thread hide each other's latency."""

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _chunk_bits(magnitudes, start, ENTRIES: tl.constexpr, CHUNK: tl.constexpr):
    """Magnitudes as integers in the same order, negative where there is no candidate."""
    place = start + tl.arange(0, CHUNK)
    magnitude = tl.load(magnitudes + place, mask=place < ENTRIES, other=-1.0)
    # What is no number counts as infinite, so that thresholds cannot overflow.
    return tl.minimum(magnitude.to(tl.int32, bitcast=True), INFINITY_BITS)


@triton.jit
def _ranks(marked, before):
    """Count marks i32 ``[rows, columns]`` in order, from ``before`` on.

    Returns: (count up to and with each place, the same of each row's end ``[rows]``, of the last).
    """
    in_row = tl.sum(marked, axis=1)
    row_ends = before + tl.cumsum(in_row, axis=0)
    ranks = (row_ends - in_row)[:, None] + tl.cumsum(marked, axis=1)
    return ranks, row_ends, before + tl.sum(in_row, axis=0)


@triton.jit
def select_outliers(
    magnitudes,
    entries,
    pools,
    counts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPACITY: tl.constexpr,
    OFFSETS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fill the pool of one page and head. Grid: ``(P * H,)``.

    Args:
        magnitudes: f32 ``[P, H, ROWS, COLUMNS]``, -1 where there is no candidate.
        entries: i16 of the same shape, read at the candidates that are kept.
        pools: out, i16 ``[P, H, CAPACITY]``; places that are not used become 0.
        counts: out, entries of each row, u8 ``[P, H, ROWS]``; with OFFSETS where each row's begin
            and end, i16 ``[P, H, ROWS + 1]``, to be read as unsigned.
        CHUNK_ROWS, WIDTH: a chunk of rows by columns, powers of two.
    """
    ENTRIES: tl.constexpr = ROWS * COLUMNS
    pool = tl.program_id(0).to(tl.int64)
    magnitudes += pool * ENTRIES
    entries += pool * ENTRIES
    pools += pool * CAPACITY
    counts += pool * (ROWS + 1) if OFFSETS else pool * ROWS

    found = tl.zeros([CHUNK], tl.int32)
    for start in range(0, ENTRIES, CHUNK):
        found += (_chunk_bits(magnitudes, start, ENTRIES, CHUNK) >= 0).to(tl.int32)
    # Candidates above the threshold are kept, and of those at it the first ``room``.
    threshold = -1
    room = 0
    if tl.sum(found, axis=0) > CAPACITY:
        # The largest integer that at least CAPACITY candidates reach, two bits a pass; fewer are
        # above it.
        threshold = 0
        above = 0
        for step in range(16):
            quarter = 1 << tl.maximum(29 - 2 * step, 0)
            second = threshold + quarter
            third = second + quarter
            fourth = third + quarter
            reach_second = tl.zeros([CHUNK], tl.int32)
            reach_third = tl.zeros([CHUNK], tl.int32)
            reach_fourth = tl.zeros([CHUNK], tl.int32)
            for start in range(0, ENTRIES, CHUNK):
                bits = _chunk_bits(magnitudes, start, ENTRIES, CHUNK)
                reach_second += (bits >= second).to(tl.int32)
                reach_third += (bits >= third).to(tl.int32)
                reach_fourth += (bits >= fourth).to(tl.int32)
            reach = tl.sum(reach_second, axis=0)
            reach_more = tl.sum(reach_third, axis=0)
            reach_most = tl.sum(reach_fourth, axis=0)
            enough = (reach >= CAPACITY).to(tl.int32) + (reach_more >= CAPACITY).to(tl.int32)
            threshold += quarter * (enough + (reach_most >= CAPACITY).to(tl.int32))
            # Right after the last pass, which has at most one step of 1 left to go.
            above = tl.where(reach >= CAPACITY, reach_more, reach)
        room = CAPACITY - above

    kept_before = 0
    level_before = 0
    column = tl.arange(0, WIDTH)[None, :]
    if OFFSETS:
        tl.store(counts, 0)
    for start in range(0, ROWS, CHUNK_ROWS):
        row = start + tl.arange(0, CHUNK_ROWS)
        place = row[:, None] * COLUMNS + column
        inside = (row[:, None] < ROWS) & (column < COLUMNS)
        magnitude = tl.load(magnitudes + place, mask=inside, other=-1.0)
        bits = tl.minimum(magnitude.to(tl.int32, bitcast=True), INFINITY_BITS)
        level = (bits == threshold).to(tl.int32)
        rank, _, level_before = _ranks(level, level_before)
        kept = ((bits > threshold) | ((level == 1) & (rank <= room))).to(tl.int32)
        if COLUMNS == 256 and not OFFSETS:
            # A count is one byte: of 256 channels a token keeps the first 255.
            full = tl.sum(kept, axis=1)[:, None] == 256
            kept = tl.where(full & (column == 255), 0, kept)
        rank, row_ends, kept_after = _ranks(kept, kept_before)
        # Never beyond the pool, whatever the magnitudes are.
        stored = (kept == 1) & (rank <= CAPACITY)
        entry = tl.load(entries + place, mask=stored, other=0)
        tl.store(pools + rank - 1, entry, mask=stored)
        if OFFSETS:
            tl.store(counts + row + 1, row_ends.to(tl.int16), mask=row < ROWS)
        else:
            tl.store(counts + row, tl.sum(kept, axis=1).to(tl.uint8), mask=row < ROWS)
        kept_before = kept_after
    for start in range(0, CAPACITY, CHUNK):
        place = start + tl.arange(0, CHUNK)
        unused = (place >= kept_before) & (place < CAPACITY)
        tl.store(pools + place, tl.zeros([CHUNK], tl.int16), mask=unused)
