"""Where the outlier passes of the fast path keep running sums, and how many programs do."""

from __future__ import annotations

import torch

from kvq_kernels.nvidia.entry_counts import slots

Buffer = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""

MOST_BYTES = 64 * 2**20
"""Of the key pass. Its programs take pages in turn, so that fewer of them do the same."""

KEY_PROGRAMS = 2
"""Of the key pass for each split. More wait for memory at the same time, and begin more often."""

LARGE_LIST = 1024


def value_warps(capacity: int) -> int:
    """Warps of a program of the value pass, a page each at a time; the same holds."""
    return 2 if capacity <= LARGE_LIST else 1


def key_scratch(
    B: int, H: int, width: int, D: int, capacity: int, *, max_pages: int, splits: int
) -> dict[str, Buffer]:
    """Buffers of ``key_outlier_scores``; their third dimension is the number of programs."""
    lanes = max(4, width)
    rows = slots(capacity)
    each = 4 * rows * lanes + 4 * (rows - 1) + 4 * D * lanes
    programs = max(1, min(max_pages, KEY_PROGRAMS * splits, MOST_BYTES // (each * max(1, B * H))))
    return {
        "key_sums": ((B, H, programs, rows, lanes), torch.float32),
        "key_marks": ((B, H, programs, rows - 1), torch.int32),
        "key_queries": ((B, H, programs, lanes // 4, D, 2, 4), torch.float16),
    }


def value_scratch(
    B: int, H: int, width: int, D: int, capacity: int, *, splits: int
) -> dict[str, Buffer]:
    """Buffer of ``value_outlier_sums``."""
    rows = slots(capacity, D)
    shape = (B, H, splits, value_warps(capacity), rows, max(4, width))
    return {"value_sums": (shape, torch.float32)}
