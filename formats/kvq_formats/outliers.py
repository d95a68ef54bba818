"""The sparse part of dense-and-sparse: which residuals a page keeps, and in what bytes.

An outlier is stored as the *residual* ``x - decoded(clamped code)``, so dense and sparse parts
simply add. A page and head has room for a fixed number of them, the largest first; what finds no
room stays clamped. An entry takes 16 bits::

    key:    [ signed residual: 16 - ceil(log2 D) bits | channel: ceil(log2 D) bits ]
    value:  [ signed residual: 8 bits                 | token in the page: 8 bits  ]

Residuals count steps of ``half_range * outlier_step`` and saturate. Key entries are sorted by token
with a count a token; value entries by channel with D + 1 offsets.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS, KVQConfig

TOKEN_BITS: Final = 8
ALIGNMENT: Final = 8
"""Entries: pools and lists are a multiple of 16 bytes."""


def channel_bits(head_dim: int) -> int:
    """Bits of a key entry that name its channel."""
    return max(1, (head_dim - 1).bit_length())


def residual_limits(index_bits: int) -> tuple[int, int]:
    """Smallest and largest residual, in steps, beside an index of ``index_bits``."""
    span = 1 << (15 - index_bits)
    return -span, span - 1


def _aligned(entries: float) -> int:
    return math.ceil(entries / ALIGNMENT) * ALIGNMENT


def key_pool_capacity(config: KVQConfig, head_dim: int) -> int:
    """Entries of a key pool, a page and head."""
    if config.outlier_fraction == 0 or config.outlier_capacity == 0:
        return 0
    return _aligned(config.outlier_capacity * PAGE_TOKENS * head_dim)


def value_outliers_per_side(config: KVQConfig, num_kv_heads: int, head_dim: int) -> int:
    """Largest, and as many smallest, entries of a token's vector that are outliers."""
    if config.outlier_fraction == 0:
        return 0
    size = head_dim * (num_kv_heads if config.value_grain == "token" else 1)
    return max(1, round(config.outlier_fraction / 2 * size))


def value_list_capacity(config: KVQConfig, num_kv_heads: int, head_dim: int) -> int:
    """Entries of a value list, a page and head."""
    sharing = num_kv_heads if config.value_grain == "token" else 1
    per_token = 2 * value_outliers_per_side(config, num_kv_heads, head_dim)
    return _aligned(config.value_capacity_factor * PAGE_TOKENS * per_token / sharing)


def keep_largest(magnitude: Tensor, candidates: Tensor, room: Tensor) -> Tensor:
    """Mark the candidates that find room in their page, largest magnitude first.

    Args:
        magnitude: f32 ``[P, H, E]``, size of each entry's residual.
        candidates: bool ``[P, H, E]``.
        room: i64 ``[P]``, entries that a page has room for, at least 1.

    Returns: bool ``[P, H, E]``. Equal magnitudes go by their place, first come first.
    """
    ranked = torch.where(candidates, magnitude, -1.0)
    most = min(int(room.max()), ranked.shape[-1])
    largest = ranked.topk(most, dim=-1).values
    last = (room.clamp(max=most) - 1)[:, None, None].expand(*ranked.shape[:2], 1)
    threshold = largest.gather(-1, last)
    above, level = ranked > threshold, ranked == threshold
    left = room[:, None, None] - above.sum(-1, keepdim=True)
    return candidates & (above | (level & (level.cumsum(-1) <= left)))


def quantize_residuals(residual: Tensor, *, step: float, index_bits: int) -> Tensor:
    """Residuals f32, in units of half_range, to signed steps i32, saturating."""
    low, high = residual_limits(index_bits)
    # By a tensor: torch on CUDA multiplies by the reciprocal of a number, which rounds otherwise.
    steps = residual / torch.tensor(step, dtype=residual.dtype, device=residual.device)
    return steps.round().clamp(low, high).int()


def pack_entries(kept: Tensor, steps: Tensor, index: Tensor, *, bits: int, capacity: int) -> Tensor:
    """Gather kept entries, in their order, into pools.

    Args:
        kept: bool ``[P, H, E]``, at most ``capacity`` true a pool.
        steps: i32 ``[P, H, E]``, quantized residuals.
        index: i32 ``[E]``, channel (keys) or token (values) of each entry.
        bits: width of the index.
        capacity: entries of a pool.

    Returns: i16 ``[P, H, capacity]``; places that are not used hold 0.
    """
    entries = ((steps << bits) | index).to(torch.int16)
    place = (kept.cumsum(-1) - 1).masked_fill(~kept, capacity)
    pools = torch.zeros(*kept.shape[:2], capacity + 1, dtype=torch.int16, device=kept.device)
    # Everything that is not kept lands in the one spare place behind the pool.
    return pools.scatter(-1, place, entries)[..., :capacity].contiguous()


def unpack_entries(pools: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Split entries i16 into (steps i32, index i64), same shape."""
    words = pools.int()
    return words >> bits, (words & ((1 << bits) - 1)).long()
