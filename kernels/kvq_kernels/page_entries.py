"""Entries of a block table, and positions of a page's tokens, in kernels (``packed_rows``)."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kvq_kernels import packed_rows

PAGE_IDS: Final = tl.constexpr(packed_rows.PAGE_ID_MASK)
"""Bits of an entry that name the page; its numbers in the pool are counted in 64 bits."""

GROWING: Final = ("table_width", "max_pages", "splits")
"""Arguments that grow with a cache: code that is made for 1, or multiples of 16, would be made anew
while a model generates."""

CUT: Final = tl.constexpr(packed_rows.CUT_SHIFT)
"""Above them, how many tokens of the page were cut."""


@triton.jit
def token_positions(base, irregular_positions, place):
    """Positions of the places of a page: consecutive from ``base`` on, or those of a line."""
    listed = tl.load(irregular_positions - (base + 1) * 256 + place, mask=base < 0, other=0)
    return tl.where(base < 0, listed, base + place)
