"""What kernels read beside the cache: tables of one layer, made once for each device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from kvq_formats.codebook import LEVELS
from kvq_formats.errors import KVQError
from kvq_kernels.pair_lookup import pair_table

if TYPE_CHECKING:
    from kvq_formats.config import KVQConfig
    from kvq_formats.parameters import LayerParameters
    from kvq_kernels.phases import Phases

HALF_LARGEST = torch.finfo(torch.float16).max
SMALLEST_TILE = 16
"""Channels that a matrix instruction multiplies at a time."""


@dataclass(frozen=True, eq=False)
class KernelTables:
    """One layer's tables. Channels are in rotary channel order.

    Fields:
        parameters, config: what the pages were encoded with.
        key_pairs, value_pairs: i32, ``pair_lookup.pair_table``.
        half_range, center: f16 ``[H, D]``, of the keys.
        outlier_half_range: f32 ``[H, D]``.
    """

    parameters: LayerParameters
    config: KVQConfig
    key_pairs: Tensor
    value_pairs: Tensor
    half_range: Tensor
    center: Tensor
    outlier_half_range: Tensor

    @classmethod
    def of(
        cls, parameters: LayerParameters, config: KVQConfig, *, device: torch.device | str
    ) -> KernelTables:
        """Convert. Raises KVQError where keys reach beyond what f16 holds."""
        key = parameters.key
        # A rotated number is at most sqrt(2) times the largest of its pair.
        entries = key.codebook.offset + key.codebook.step * torch.tensor([0.0, LEVELS])
        reach = key.center.abs() + key.half_range * entries.abs().max().to(key.center.device)
        largest = float(reach.max()) * 2**0.5
        if largest > HALF_LARGEST:
            raise KVQError(
                f"keys of this model reach {largest:.3g}; Triton kernels hold decoded keys in "
                f"16 bits, up to {HALF_LARGEST:.0f}.",
                hint="--impl reference (impl='reference' in Python)",
            )
        return cls(
            parameters=parameters,
            config=config,
            key_pairs=pair_table(key.codebook, device=device),
            value_pairs=pair_table(parameters.value.codebook, device=device),
            half_range=key.half_range.half().contiguous().to(device),
            center=key.center.half().contiguous().to(device),
            outlier_half_range=key.half_range.float().contiguous().to(device),
        )

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.half_range.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.half_range.shape[1]


def channel_tiles(head_dim: int, phases: Phases) -> dict[str, int]:
    """How kernels cut D channels: compile-time constants.

    Raises KVQError where a rotary pair's halves have an odd number of channels, because words hold
    two neighbours of one half.
    """
    half = len(phases.high)
    if half % 2:
        raise KVQError(
            f"the model rotates {2 * half} of {head_dim} channels; Triton kernels need a multiple "
            "of 4.",
            hint="--impl reference (impl='reference' in Python)",
        )
    rest = head_dim - 2 * half
    return {
        "D": head_dim,
        "HALF": half,
        "HALF_TILE": max(SMALLEST_TILE, triton.next_power_of_2(half)),
        "REST_TILE": max(SMALLEST_TILE, triton.next_power_of_2(rest)) if rest else 0,
        "D_TILE": max(SMALLEST_TILE, triton.next_power_of_2(head_dim)),
    }
