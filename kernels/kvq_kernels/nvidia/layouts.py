"""Where numbers lie among the 32 lanes of a warp: one program is one warp.

A matrix instruction multiplies 16 rows by 16 columns (A, keys or values) with 16 rows by 8 columns
(B, queries or weights). Lane ``4 g + t`` holds of A rows g and g + 8, columns ``2 t``, ``2 t + 1``,
``2 t + 8`` and ``2 t + 9`` (PTX ISA, mma.m16n8k16). Which channel or token a row or column *is* may
be chosen, as long as both factors agree: so that what a lane needs lies side by side in memory.

* columns of keys: lane t of every k-step has the channels of a quarter of the half, in order;
* columns of values: lane t has tokens 4 t to 4 t + 3 of a subset, so row r of a tile of scores or
  weights is token ``4 (r / 2 mod 4) + 2 (r / 8) + r mod 2`` (``token_of_row``).
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from typing import Final

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HEADS: Final = gl.constexpr(8)
"""Columns of B: query heads of a group, those behind G are not used."""

CHANNELS: Final = gl.constexpr(32)
"""Channels of values that are multiplied at a time: two chains of matrix instructions."""

MMA: Final = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
A: Final = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
B: Final = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))

_G: Final = [[1, 0], [2, 0], [4, 0]]

VALUE_WORDS: Final = gl.constexpr(
    gl.DistributedLinearLayout([[0, 1], [8, 0], [16, 0]], [[0, 2], [0, 4], *_G], [], [], [32, 8])
)
"""i32 ``[CHANNELS, 8]``, two tokens a word."""

LANES: Final = gl.constexpr(gl.DistributedLinearLayout([], [[0], [0], [1], [2], [4]], [], [], [8]))
"""One number for each g."""

PLAIN: Final = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


CHUNK: Final = gl.constexpr(16)
"""Words of a row of keys that are worked on at a time, of each rotary half: four a lane."""

KEY_WORDS: Final = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], *_G], [], [], [16, CHUNK.value]
    )
)
"""i32 ``[16, CHUNK]``, two channels a word."""

QUERIES: Final = gl.constexpr(
    gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0], [0, 1], [0, 2], [0, 4]], [], [],
        [2 * CHUNK.value, HEADS.value],
    )
)  # fmt: skip
"""f16 ``[2 CHUNK, HEADS]``, channels as in KEY_WORDS."""

_TILE: Final = gl.shared_memory_descriptor
reinterpret: Final = getattr(_TILE, "reinterpret", None) or _TILE._reinterpret
"""A tile in shared memory with another shape: Triton 3.9 has given it a public name."""


@gluon.constexpr_function
def page_scores(width):
    """f32 ``[256, width]``: a lane has every 32nd row of all heads."""
    return gl.BlockedLayout([1, width], [32, 1], [1, 1], [1, 0])


@gluon.jit
def token_of_row(row):
    """Which token of a page a row of the page's scores is, i32."""
    return (row & 0xF0) + 4 * ((row >> 1) & 3) + 2 * ((row >> 3) & 1) + (row & 1)


@gluon.jit
def place_of(column, HALF: gl.constexpr, WIDTH: gl.constexpr):
    """Where in a rotary half a column of chunk 0 is; those of the next are WIDTH further on.

    A lane has WIDTH neighbours of each chunk, and its chunks lie side by side.
    """
    return (column // WIDTH) * (HALF // 4) + column % WIDTH


@gluon.jit
def key_operand(words):
    """Key tile i32 ``[16, CHUNK]`` in the order of an A operand."""
    return gl.reshape(gl.permute(gl.reshape(words, [16, 4, CHUNK // 4]), [0, 2, 1]), [16, CHUNK])


@gluon.jit
def query_operand(numbers):
    """Queries f16 ``[2 CHUNK, HEADS]`` as a B operand, in the order of ``key_operand``."""
    parts = gl.permute(gl.reshape(numbers, [4, CHUNK // 4, 2, HEADS]), [1, 0, 2, 3])
    return gl.convert_layout(gl.reshape(parts, [2 * CHUNK, HEADS]), B, assert_trivial=True)


@gluon.jit
def value_operand(words):
    """Value tile i32 ``[CHANNELS, 8]`` in the order of an A operand."""
    return gl.reshape(gl.permute(gl.reshape(words, [CHANNELS, 4, 2]), [0, 2, 1]), [CHANNELS, 8])


@gluon.jit
def each_lane(numbers, ROWS: gl.constexpr, layout: gl.constexpr):
    """One number a lane, ``[8]`` in LANES, for all rows of a tile, ``[ROWS, 1]``.

    A table that is the same for all lanes would be kept in uniform registers, from which each
    ``prmt`` would have to copy it first; so each lane loads its own.
    """
    for _ in gl.static_range(3, ROWS.bit_length() - 1):
        numbers = gl.reshape(gl.permute(gl.join(numbers, numbers), [1, 0]), [2 * numbers.shape[0]])
    return gl.convert_layout(numbers, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]


@gluon.jit
def lookup_words(table, WORDS: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """WORDS words of a lookup, i32 ``[ROWS, 1]`` each."""
    lane = gl.arange(0, 8, LANES)
    words = ()
    for word in gl.static_range(WORDS):
        words += (each_lane(gl.load(table + 8 * word + lane), ROWS, layout),)
    return words


@gluon.jit
def sums_of_lanes(numbers, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Sums over the rows ``[256, WIDTH]`` that a lane has, ``[32, WIDTH]``."""
    return gl.convert_layout(
        gl.sum(gl.reshape(numbers, [8, 32, WIDTH]), axis=0), layout, assert_trivial=True
    )
