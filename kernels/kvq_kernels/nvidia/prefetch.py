"""Fetching the next page while this one is worked on."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_LINE: Final = gl.constexpr(32)
"""i32 of a cache line."""

_WARP: Final = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def prefetch(words, COUNT: gl.constexpr):
    """Bring COUNT i32 from ``words`` on into the second-level cache: a line a lane.

    Eight warps a multiprocessor are too few to hide what memory takes to answer; they do hide the
    second-level cache.
    """
    lane = gl.arange(0, 32, _WARP)
    for first in gl.static_range(0, COUNT, 32 * _LINE):
        # Lanes behind the end fetch the last line again.
        place = gl.minimum(first + lane * _LINE, COUNT - 1)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [words + place],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
