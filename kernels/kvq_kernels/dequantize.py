"""Packed pages to f32 numbers in plain torch, for attention on CPUs and any other device.

Gives what ``kvq_formats.pages.decode_keys`` and ``decode_values`` give, number for number: the same
f32 operations in the same order. A packed word of 32 bits holds codes of two neighbours from
several subsets (``kvq_formats.packing``), and the two codes of a subset are read together: a shift
and a mask leave an index into a table of *pairs*, and one lookup of eight bytes gives both numbers.
Nothing here waits for the device.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor

from kvq_formats import outliers
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import ConfigError
from kvq_formats.packing import ROWS
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, ValueParameters
from kvq_kernels.workspace import Workspace

_SUBSETS: Final = PAGE_TOKENS // ROWS

_SUBSET_SHIFTS: Final = {
    2: (0, 2, 4, 6, 16, 18, 20, 22),
    3: (0, 8, 16, 24),
    4: (0, 8, 16, 24),
}
"""Where the lower neighbour's code of each subset of a plane begins in a word of 32 bits."""

_NEIGHBOUR_SHIFT: Final = {2: 8, 3: 4, 4: 4}
"""How much higher the upper neighbour's code is."""

_SPARE_SHIFTS: Final = (3, 2, 1)
_SPARE_MASKS: Final = (0x11111111, 0x22222222, 0x44444444)
"""3 bits: where plane p's fourth bits go to become bit p of the codes of a fourth plane."""


class _PairTable:
    """Both numbers of every pair of codes, to be looked up at once."""

    def __init__(self, codebook: Codebook, *, bits: int, device: torch.device | str) -> None:
        if bits not in _SUBSET_SHIFTS or bits != codebook.bits:
            raise ConfigError(
                f"codes of {bits} bits cannot be decoded with a codebook of {codebook.bits} bits; "
                f"expected 2, 3 or 4, the same for both.",
                hint="calibrate the model again: kvq calibrate MODEL --bits 3",
            )
        self.bits = bits
        code = (1 << bits) - 1
        neighbour = _NEIGHBOUR_SHIFT[bits]
        self.mask = code | code << neighbour
        pairs = torch.arange(self.mask + 1)
        codes = torch.stack([pairs & code, pairs >> neighbour & code], dim=-1)
        # As integers: what is moved must keep its bits.
        self.numbers = codebook.decode_entries.cpu()[codes].view(torch.int64).flatten().to(device)
        column = partial(torch.tensor, dtype=torch.int32, device=device)
        self.shifts = column(_SUBSET_SHIFTS[bits])[:, None, None]
        self.spare_shifts = column(_SPARE_SHIFTS)[:, None, None]
        self.spare_masks = column(_SPARE_MASKS)[:, None, None]

    def indices(self, words: Tensor, workspace: Workspace) -> Tensor:
        """Words i16 ``[P, H, bits, S, F]`` to indices i32 ``[P, H, 16 subsets, S, F / 2]``."""
        P, H, _, S, F = words.shape
        planes = words.contiguous().view(torch.int32)
        if self.bits == 3:
            spare = (planes >> self.spare_shifts).bitwise_and_(self.spare_masks)
            first, second, third = spare.split(1, dim=2)
            planes = torch.cat([planes, first | second | third], dim=2)
        # Shifts carry the sign along; the mask drops it.
        shape = (P, H, _SUBSETS, S, F // 2)
        indices = workspace.take("indices", shape, torch.int32, words.device)
        by_plane = indices.view(P, H, planes.shape[2], len(self.shifts), S, F // 2)
        torch.bitwise_right_shift(planes[:, :, :, None], self.shifts, out=by_plane)
        return indices.bitwise_and_(self.mask)

    def lookup(self, indices: Tensor, workspace: Workspace, name: str) -> Tensor:
        """Numbers f32 ``[2 n]`` of n indices, two an index, in their order; kept as ``name``."""
        numbers = workspace.take(name, (indices.numel(),), torch.int64, indices.device)
        torch.index_select(self.numbers, 0, indices.view(-1), out=numbers)
        return numbers.view(torch.float32)


def _add_residuals(
    numbers: Tensor, pools: Tensor, bounds: Tensor, *, index_bits: int, step: float
) -> None:
    """Add the entries of pools to numbers f32 ``[P, H, R, width]``, in place.

    Entries are sorted by the row r in R that they belong to and name a column. ``bounds`` i64
    ``[P, H, R]`` says where each row's run of entries ends.
    """
    P, H, R, width = numbers.shape
    capacity = pools.shape[-1]
    # The row of a pool's place i is how many runs have ended at i: mark the ends, then count, so
    # that no place has to be searched for. The last run's end starts no row and has no mark.
    ends = bounds[..., :-1].clamp(max=capacity)
    row = ends.new_zeros(P, H, capacity + 1)
    row = row.scatter_add_(-1, ends, ends.new_ones(1, 1, 1).expand_as(ends)).cumsum_(-1)
    used = torch.arange(capacity, device=pools.device) < bounds[..., -1:]
    # A place that is not used becomes entry 0: a residual of 0.
    entries = pools * used
    residual = (entries >> index_bits).float().mul_(step)
    where = row[..., :-1] * width + (entries & ((1 << index_bits) - 1))
    # Flat indices: one loop adds the entries of all pages and heads.
    size = R * width
    where += torch.arange(0, P * H * size, size, device=pools.device).view(P, H, 1)
    numbers.view(-1).scatter_add_(0, where.flatten(), residual.flatten())


class KeyDequantizer:
    """Decodes key pages of one layer; its tables are made once."""

    def __init__(
        self,
        parameters: KeyParameters,
        *,
        bits: int,
        device: torch.device | str = "cpu",
        workspace: Workspace | None = None,
    ) -> None:
        """``bits`` is the width of a code, 2, 3 or 4; ``device`` is where the pages will be.

        Raises ConfigError for another width, or one that is not the codebook's.
        """
        self._table = _PairTable(parameters.codebook, bits=bits, device=device)
        self._half_range = parameters.half_range.to(device)[:, None, :]
        self._center = parameters.center.to(device)[:, None, :]
        self._outlier_step = parameters.outlier_step
        self._workspace = workspace

    def dequantize(self, pages: KeyPages) -> Tensor:
        """Keys before RoPE, f32 ``[P, H, 256, D]``; the pages are only read.

        With a workspace they are there until the next call.
        """
        P, H, _, _, D = pages.words.shape
        workspace = self._workspace or Workspace()
        indices = self._table.indices(pages.words, workspace)
        keys = self._table.lookup(indices, workspace, "keys").view(P, H, PAGE_TOKENS, D)
        if pages.outliers.shape[-1]:
            _add_residuals(
                keys,
                pages.outliers,
                pages.outlier_counts.cumsum(-1),
                index_bits=outliers.channel_bits(D),
                step=self._outlier_step,
            )
        return keys.mul_(self._half_range).add_(self._center)


class ValueDequantizer:
    """Decodes value pages of one layer; its tables are made once."""

    def __init__(
        self,
        parameters: ValueParameters,
        *,
        bits: int,
        device: torch.device | str = "cpu",
        workspace: Workspace | None = None,
    ) -> None:
        """``bits`` is the width of a code, 2, 3 or 4; ``device`` is where the pages will be.

        Raises ConfigError for another width, or one that is not the codebook's.
        """
        self._table = _PairTable(parameters.codebook, bits=bits, device=device)
        self._outlier_step = parameters.outlier_step
        self._workspace = workspace

    def dequantize(self, pages: ValuePages) -> tuple[Tensor, Tensor, Tensor]:
        """Values without the scales of their tokens; the pages are only read.

        The value of a token is ``normalised * half_range + center``. Attention multiplies a
        token's weight with its scales instead, which saves a pass over the numbers.

        Returns: (normalised f32 ``[P, H, D, 256]``, channel-major, outliers added; half_range f32
        ``[P, S, 256]``; center f32 ``[P, S, 256]``), S being 1 or H.
        """
        P, H, _, D, _ = pages.words.shape
        # Reordered while a pair of numbers is still one index. The pairs of a channel and subset
        # stay together, so they move two at a time.
        workspace = self._workspace or Workspace()
        subsets = self._table.indices(pages.words, workspace).view(torch.int64).transpose(2, 3)
        device = pages.words.device
        by_channel = workspace.take("by channel", tuple(subsets.shape), torch.int64, device)
        indices = by_channel.copy_(subsets).view(torch.int32)
        normalised = self._table.lookup(indices, workspace, "values").view(P, H, D, PAGE_TOKENS)
        if pages.outliers.shape[-1]:
            _add_residuals(
                normalised,
                pages.outliers,
                pages.outlier_offsets.long()[..., 1:],
                index_bits=outliers.TOKEN_BITS,
                step=self._outlier_step,
            )
        half_range, center = pages.scales.movedim(-1, 0).float().contiguous().unbind()
        return normalised, half_range, center


def apply_scales(normalised: Tensor, half_range: Tensor, center: Tensor) -> Tensor:
    """Values f32 ``[P, H, 256, D]`` of what ``ValueDequantizer.dequantize`` returns.

    For tests and debugging: attention folds the scales into its weights.
    """
    values = normalised * half_range[:, :, None, :] + center[:, :, None, :]
    return values.transpose(2, 3).contiguous()
