"""Some tokens of the calibration text as they are, where a histogram is not enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


def stride_of(tokens: int, *, at_most: int) -> int:
    """The least stride at which no more than ``at_most`` of so many tokens are kept."""
    return max(1, -(-tokens // at_most))


@dataclass
class TokenSample:
    """Every ``stride``-th token's keys, or values, of one layer, with what gradients there weigh.

    Fields:
        stride: 1 keeps all.
        dtype: what they are kept in; the model's, which they come from, loses nothing.
    """

    stride: int
    dtype: torch.dtype
    _seen: int = 0
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: int, *, at_most: int, dtype: torch.dtype) -> Self:
        """Of ``tokens`` in all, evenly."""
        return cls(stride_of(tokens, at_most=at_most), dtype)

    def add(self, numbers: Tensor, gradients: Tensor) -> None:
        """Take in a batch; both f32 ``[tokens, H, D]``."""
        rows = slice(-self._seen % self.stride, None, self.stride)
        self._seen += len(numbers)
        energy = gradients[rows].square().sum(dim=-1).cpu()
        self._kept.append((numbers[rows].to("cpu", self.dtype, copy=True), energy))

    @property
    def numbers(self) -> Tensor:
        """f32 ``[tokens, H, D]``, keys before RoPE."""
        return torch.cat([numbers for numbers, _ in self._kept]).float()

    @property
    def energy(self) -> Tensor:
        """Squared gradients summed over channels, f32 ``[tokens, H]``."""
        return torch.cat([energy for _, energy in self._kept])
