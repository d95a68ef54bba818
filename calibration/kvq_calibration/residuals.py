"""The step of stored outlier residuals: fine enough for most, wide enough for the largest."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_formats.codebook import Codebook
from kvq_formats.outliers import residual_limits

BINS = 1024
WIDEST = 16.0
"""The histogram spans ``|z|`` from 1 to 2**16, in logarithmic bins."""
CANDIDATES = 128


class OutlierHistogram:
    """Sensitivity-weighted histogram of how far outliers lie out, the two sides apart."""

    def __init__(self) -> None:
        self.weight = torch.zeros(2, BINS, dtype=torch.float64)
        self.magnitude = torch.zeros(2, BINS, dtype=torch.float64)

    def add(self, z: Tensor, weight: Tensor) -> None:
        """Take in normalised outliers f32 ``[E]`` with their weights f32 ``[E]``."""
        size = z.abs().clamp(1.0, 2.0**WIDEST)
        index = (size.log2() * (BINS / WIDEST)).long().clamp(0, BINS - 1) + BINS * (z > 0)
        w = weight.double()
        self.weight += torch.bincount(index, w, 2 * BINS).reshape(2, BINS)
        self.magnitude += torch.bincount(index, w * size.double(), 2 * BINS).reshape(2, BINS)


def fit_outlier_step(histogram: OutlierHistogram, codebook: Codebook, *, index_bits: int) -> float:
    """The step, in units of half_range, with the least expected weighted squared error.

    A residual ``r`` within reach costs ``step**2 / 12``; beyond it what saturation cuts off.
    """
    weight = histogram.weight
    used = weight > 0
    if not used.any():
        return 2.0**-6
    ends = codebook.decode_entries[[0, -1]].abs().double()
    means = histogram.magnitude / weight.clamp(min=torch.finfo(torch.float64).tiny)
    residual = (means - ends[:, None]).abs()[used]
    mass = weight[used]
    _, limit = residual_limits(index_bits)
    largest = float(residual.max().clamp(min=1e-3)) / limit
    steps = largest * torch.logspace(0, -12, CANDIDATES, base=2, dtype=torch.float64)
    cut = (residual - limit * steps[:, None]).clamp(min=0).square()
    inside = (steps.square() / 12)[:, None].expand_as(cut)
    cost = (mass * torch.where(cut > 0, cut, inside)).sum(-1)
    return float(steps[cost.argmin()].float())
