"""Outlier thresholds of the keys: two quantiles of each channel, found while the text streams by.

KVQuant, sections 3.4 and 3.6: ``lower`` and ``upper`` are the ``f/2`` and ``1 - f/2`` quantiles
of a channel over the calibration tokens; ``f = 0`` gives minimum and maximum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEPT = 1024
"""Most entries of a tail that are held. A calibration text whose tails are longer is sampled at
regular steps; at 1 % outliers that starts beyond 200,000 tokens."""


class ChannelQuantiles:
    """Both tails of every channel, exact as ``torch.quantile`` (linear interpolation).

    Only the tails are held, so memory is ``2 * min(f/2 * tokens, 1024)`` numbers a channel however
    long the text is.

    Args:
        outlier_fraction: ``f``, both tails together.
        total_tokens: tokens that will be added in all.
    """

    def __init__(self, outlier_fraction: float, *, total_tokens: int) -> None:
        tail = outlier_fraction / 2
        self.stride = max(1, math.ceil(tail * total_tokens / (KEPT - 2)))
        self.tail = tail
        self.count = 0
        self.seen = 0
        # The interpolated quantile lies between two order statistics, counted from the end.
        sampled = -(-total_tokens // self.stride)
        self.held = int(tail * max(sampled - 1, 0)) + 2
        self.largest: Tensor | None = None
        self.smallest: Tensor | None = None

    def add(self, keys: Tensor) -> None:
        """Take in keys f32 ``[T, ...]`` of consecutive tokens; the other axes are channels."""
        first = -self.seen % self.stride
        self.seen += len(keys)
        rows = keys[first :: self.stride]
        self.count += len(rows)
        self.largest = self._tail(self.largest, rows, largest=True)
        self.smallest = self._tail(self.smallest, rows, largest=False)

    def _tail(self, held: Tensor | None, rows: Tensor, *, largest: bool) -> Tensor:
        merged = rows if held is None else torch.cat([held, rows])
        kept = min(self.held, len(merged))
        return merged.topk(kept, dim=0, largest=largest).values

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """``(lower, upper)``, f32, the shape of a token's keys."""
        if self.count == 0 or self.largest is None or self.smallest is None:
            raise ValueError("no keys were added")
        place = self.tail * (self.count - 1)
        index, fraction = int(place), place - int(place)
        following = min(index + 1, len(self.largest) - 1)
        upper = torch.lerp(self.largest[index], self.largest[following], fraction)
        lower = torch.lerp(self.smallest[index], self.smallest[following], fraction)
        return lower, upper


def center_and_half_range(
    lower: Tensor, upper: Tensor, *, margin: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``((upper + lower)/2, margin * (upper - lower)/2)``, f32; the half-range is never zero.

    A channel that never moves (all thresholds equal) gets a half-range of one rounding step of its
    centre, so that it decodes to its constant.
    """
    center = upper / 2 + lower / 2
    rounding = center.abs() * torch.finfo(torch.float32).eps
    floor = rounding.clamp(min=torch.finfo(torch.float32).smallest_normal)
    return center, (margin * (upper / 2 - lower / 2)).maximum(floor)
