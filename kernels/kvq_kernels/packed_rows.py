"""The rows of one layer's packed cache, as decode kernels and their reference read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.pages import KeyPages, ValuePages

CUT_SHIFT: Final = 23
"""A block table entry is a page's id; of a page that was cut, plus ``(256 - length) << 23``."""

PAGE_ID_MASK: Final = (1 << CUT_SHIFT) - 1


def table_entry(page: int, length: int) -> int:
    """Block table entry of a page with ``length`` valid tokens, 1 to 256."""
    return page + ((PAGE_TOKENS - length) << CUT_SHIFT)


@dataclass(frozen=True)
class PackedRows:
    """B rows: sinks, pages, tail. Keys are before RoPE, channels in rotary channel order.

    Fields:
        key_pages, value_pages: the pool that all rows share, P pages in one piece.
        block_table: i32 ``[B, max_pages]``, ``table_entry`` of each page of a row, in order.
        lengths: i32 ``[B, 3]``: pages, sinks, tokens of the tail.
        exact_keys, exact_values: ``[B, H, E, D]``, any float dtype; sinks, then the tail.
        exact_positions: i32 ``[B, E]``.
        irregular_positions: i32 ``[I, 256]``, positions of the pages whose base position is
            ``-1 - i``; None if there is none.
    """

    key_pages: KeyPages
    value_pages: ValuePages
    block_table: Tensor
    lengths: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    exact_positions: Tensor
    irregular_positions: Tensor | None = None
