"""Tokens of the entries of a key pool, from the counts of tokens; one warp.

Each token marks its first entry in a list, and an entry's token is the last mark up to it.
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia.entry_sums import barrier, lane_rows

LANE = gl.constexpr(gl.SliceLayout(1, lane_rows(1)))
"""A number a lane."""

FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
"""The same, as scans want it."""

MARKS = gl.constexpr(gl.BlockedLayout([4], [32], [1], [0]))


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def before_lane(numbers, lane, LARGEST: gl.constexpr):
    """Sums, or the largest number, of all lanes before, i32 ``[32]``; 0 in the first."""
    numbers = gl.convert_layout(numbers, FLAT, assert_trivial=True)
    if LARGEST:
        upto = gl.associative_scan(numbers, 0, _larger)
    else:
        upto = gl.associative_scan(numbers, 0, _plus)
    lane = gl.convert_layout(lane, FLAT, assert_trivial=True)
    before = gl.where(lane > 0, gl.gather(upto, (lane + 31) % 32, 0), 0)
    return gl.convert_layout(before, LANE, assert_trivial=True)


@gluon.jit
def mark_tokens(marks, counts, lane, COUNT: gl.constexpr, UNIT: gl.constexpr):
    """Mark the first entry of each token by its number, times UNIT; marks of others are 0.

    Returns where entries of a lane's eight tokens begin, and their end, nine i32 ``[32]``.
    """
    for part in gl.static_range((COUNT + 127) // 128):
        mark = part * 128 + gl.arange(0, 128, layout=MARKS)
        none = gl.zeros([128], gl.int32, layout=MARKS)
        gl.store(marks + mark, none, mask=mark < COUNT)
    words = counts.to(gl.pointer_type(gl.int32), bitcast=True) + 2 * lane
    words = (gl.load(words), gl.load(words + 1))
    token_counts = ()
    count = gl.zeros([32], gl.int32, layout=LANE)
    for k in gl.static_range(8):
        token_counts += ((words[k // 4] >> (8 * (k % 4))) & 0xFF,)
        count += token_counts[k]
    ends = (before_lane(count, lane, False),)
    barrier()
    for k in gl.static_range(8):
        gl.store(marks + ends[k], (8 * lane + k) * UNIT, mask=token_counts[k] > 0)
        ends += (ends[k] + token_counts[k],)
    return ends
