"""What kernels read beside the cache: tables of one layer, made once for each device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from kvq_formats.codebook import LEVELS
from kvq_formats.errors import KVQError
from kvq_formats.pages import HALF_LARGEST
from kvq_kernels.launch import LARGEST_GROUP, LARGEST_HEAD_DIM
from kvq_kernels.nvidia.tables import LookupTables
from kvq_kernels.pair_lookup import pair_table

if TYPE_CHECKING:
    from kvq_formats.config import KVQConfig
    from kvq_formats.parameters import LayerParameters
    from kvq_kernels.phases import Phases
    from kvq_kernels.rotary import RotaryAngles

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
        lookups: for the fast path.
    """

    parameters: LayerParameters
    config: KVQConfig
    key_pairs: Tensor
    value_pairs: Tensor
    half_range: Tensor
    center: Tensor
    outlier_half_range: Tensor
    lookups: LookupTables

    @classmethod
    def of(
        cls, parameters: LayerParameters, config: KVQConfig, *, device: torch.device | str
    ) -> KernelTables:
        """Convert what ``check_layer`` accepts."""
        key = parameters.key
        return cls(
            parameters=parameters,
            config=config,
            key_pairs=pair_table(key.codebook, device=device),
            value_pairs=pair_table(parameters.value.codebook, device=device),
            half_range=key.half_range.half().contiguous().to(device),
            center=key.center.half().contiguous().to(device),
            outlier_half_range=key.half_range.float().contiguous().to(device),
            lookups=LookupTables.of(parameters, config, device=device),
        )

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.half_range.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.half_range.shape[1]


def check_layer(parameters: LayerParameters, angles: RotaryAngles, *, group_size: int) -> None:
    """Whether kernels can hold a layer with ``group_size`` query heads a key/value head.

    Raises KVQError for groups, head dimensions and rotations that they do not take, and for keys
    beyond what f16 holds.
    """
    key = parameters.key
    D = key.center.shape[1]
    if group_size > LARGEST_GROUP:
        raise _refused(
            f"{group_size} query heads share a key/value head; Triton kernels take up to "
            f"{LARGEST_GROUP}."
        )
    if D > LARGEST_HEAD_DIM:
        raise _refused(f"head_dim is {D}; Triton kernels take up to {LARGEST_HEAD_DIM}.")
    half = len(angles.frequencies)
    if half % 2:
        # Words hold two neighbours of one half.
        raise _refused(
            f"the model rotates {2 * half} of {D} channels; Triton kernels need a multiple of 4."
        )
    # A rotated number is at most sqrt(2) times the largest of its pair.
    entries = key.codebook.offset + key.codebook.step * torch.tensor([0.0, LEVELS])
    reach = key.center.abs() + key.half_range * entries.abs().max().to(key.center.device)
    largest = float(reach.max()) * 2**0.5 * max(1.0, angles.scaling)
    if largest > HALF_LARGEST:
        raise _refused(
            f"keys of this model reach {largest:.3g}; Triton kernels hold decoded keys in 16 bits, "
            f"up to {HALF_LARGEST:.0f}."
        )


def _refused(reason: str) -> KVQError:
    return KVQError(reason, hint="--impl reference (impl='reference' in Python)")


def channel_tile(channels: int) -> int:
    """Width of a tile that holds ``channels`` channels."""
    return max(SMALLEST_TILE, int(triton.next_power_of_2(channels)))


def channel_tiles(head_dim: int, phases: Phases) -> dict[str, int]:
    """How kernels cut D channels: compile-time constants."""
    half = len(phases.high)
    assert half % 2 == 0, "check_layer refuses this"
    rest = head_dim - 2 * half
    return {
        "D": head_dim,
        "HALF": half,
        "HALF_TILE": channel_tile(half),
        "REST_TILE": channel_tile(rest) if rest else 0,
        "D_TILE": channel_tile(head_dim),
    }
