"""What entries of a key pool add to their tokens' scores; one warp.

An entry is multiplied with queries of its channel and of its rotary partner, both times half-range
and scale: a line of a table f16 ``[D, 2, 4]`` of four heads, which is made once a page.
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia.entry_shares import low_bits
from kvq_kernels.nvidia.entry_sums import lane_rows
from kvq_kernels.nvidia.entry_tokens import LANE
from kvq_kernels.nvidia.half_pairs import multiply, multiply_add, multiply_negated

ROWS = gl.constexpr(lane_rows(1))
TABLE = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0]))
PAIRS = gl.constexpr(gl.BlockedLayout([1, 2], [32, 1], [1, 1], [1, 0]))


@gluon.jit
def load_heads(place, head, COUNT: gl.constexpr):
    """f16 ``[32, 4]``, 0 behind COUNT heads."""
    return gl.load(place + head, mask=head < COUNT, other=0.0)


@gluon.jit
def scaled_half_ranges(half_range, scale, lane, D: gl.constexpr):
    """Half-range times scale of every 32nd channel, a tuple of f16 ``[32, 4]``."""
    factors = ()
    for part in gl.static_range(D // 32):
        span = gl.load(half_range + part * 32 + lane)
        factors += ((span[:, None] * scale).to(gl.float16),)
    return factors


@gluon.jit
def _table_places(channel):
    """A channel's line of a table f16 ``[D, 2, 4]``."""
    channel = gl.convert_layout(channel, gl.SliceLayout(1, TABLE), assert_trivial=True)
    return (
        channel.to(gl.int64)[:, None] * 8
        + gl.arange(0, 8, layout=gl.SliceLayout(0, TABLE))[None, :]
    )


@gluon.jit
def _keep_pair(table, channel, own, partner):
    line = gl.join(own, partner).permute([0, 2, 1]).reshape([32, 8])
    gl.store(table + _table_places(channel), gl.convert_layout(line, TABLE))


@gluon.jit
def keep_table(table, queries, factors, lane, head, GROUP_WIDTH: gl.constexpr, D: gl.constexpr):
    """Make the table of a page; ``queries`` f16 ``[D, GROUP_WIDTH]``, ``head`` i32 ``[1, 4]``."""
    PARTS: gl.constexpr = D // 64
    for part in gl.static_range(PARTS):
        channel = part * 32 + lane
        place = queries + (channel * GROUP_WIDTH)[:, None]
        first = load_heads(place, head, GROUP_WIDTH)
        second = load_heads(place + D // 2 * GROUP_WIDTH, head, GROUP_WIDTH)
        one, two = factors[part], factors[PARTS + part]
        _keep_pair(table, channel, multiply(first, one), multiply(second, one))
        # What the second member turns into its partner's channel has the other sign.
        _keep_pair(table, channel + D // 2, multiply(second, two), multiply_negated(first, two))


@gluon.jit
def _pair(table, channel):
    line = gl.load(table + _table_places(channel))
    own, partner = line.reshape([32, 2, 4]).permute([0, 2, 1]).split()
    return gl.convert_layout(own, ROWS), gl.convert_layout(partner, ROWS)


@gluon.jit
def turned_entry(entry, token, offset_turns, table, HALF: gl.constexpr, BITS: gl.constexpr):
    """What an entry adds to its token's scores, f16 ``[32, 4]``; ``token`` counts in HALF."""
    channel = low_bits(entry, BITS)
    residual = (entry >> BITS).to(gl.float16)
    place = gl.convert_layout(token | (channel & (HALF - 1)), gl.SliceLayout(1, PAIRS)).to(gl.int64)
    which = gl.arange(0, 2, layout=gl.SliceLayout(0, PAIRS))[None, :]
    turn = gl.load(offset_turns + place[:, None] * 2 + which)
    residual = gl.convert_layout(residual, gl.SliceLayout(1, PAIRS), assert_trivial=True)
    cos, sin = multiply(turn, residual[:, None]).split()
    cos = gl.convert_layout(cos, LANE, assert_trivial=True)[:, None]
    sin = gl.convert_layout(sin, LANE, assert_trivial=True)[:, None]
    own, partner = _pair(table, channel)
    return multiply_add(own, cos, multiply(partner, sin))
