"""What calibration keeps of a layer's keys, or of its values: histograms in normalised units."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calibration import kmeans
from kvq_calibration.qnorm import fit_qnorm
from kvq_calibration.residuals import OutlierHistogram
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig

FARTHEST = 2.0**32
"""Where normalised outliers are cut off; residuals saturate long before."""


class NormalisedPoints:
    """Histograms of the keys, or of the values, of one layer in normalised units."""

    def __init__(self) -> None:
        self.weighted = kmeans.WeightedBins()
        self.counted = kmeans.WeightedBins()
        self.outliers = OutlierHistogram()
        self.entries = 0
        self.outlier_entries = 0

    def add(self, z: Tensor, is_outlier: Tensor, weight: Tensor | None) -> None:
        """Take in points ``z`` f32 with their weights f32, or 1 each; all of one shape."""
        # A channel that hardly ever moves has next to no range: its outliers lie beyond fp32.
        z = z.cpu().flatten().clamp(-FARTHEST, FARTHEST)
        is_outlier = is_outlier.cpu().flatten()
        weight = torch.ones_like(z) if weight is None else weight.cpu().flatten()
        self.entries += z.numel()
        self.outlier_entries += int(is_outlier.sum())
        # A weight of 0 leaves a point out; it costs less than picking the others out.
        self.weighted.add(z, weight.masked_fill(is_outlier, 0.0))
        self.counted.add(z, (~is_outlier).to(z.dtype))
        self.outliers.add(z[is_outlier], weight[is_outlier])

    @property
    def outlier_share(self) -> float:
        """Share of the entries that lie outside the thresholds."""
        return self.outlier_entries / max(self.entries, 1)

    @property
    def _inliers(self) -> kmeans.WeightedBins:
        # No sensitivity at all (a layer that the loss does not reach): plain k-means.
        return self.weighted if self.weighted.total_weight > 0 else self.counted

    def fit(self, bits: int, config: KVQConfig) -> Codebook:
        """The codebook, Q-Norm folded in if it is on, snapped to its grid."""
        solver = {"exact": kmeans.fit_codebook, "sklearn": kmeans.fit_codebook_sklearn}
        entries = solver[config.kmeans](self._inliers, 1 << bits)
        scale, shift = fit_qnorm(self.counted, entries) if config.qnorm else (1.0, 0.0)
        return Codebook.fit_grid(entries, qnorm_scale=scale, qnorm_shift=shift)

    def relative_error(self, codebook: Codebook) -> float:
        """Weighted squared error of the inliers over their weighted square."""
        bins = self._inliers
        square = bins.total_square
        if square == 0:
            return 0.0
        centroids = bins.centroids
        decoded = codebook.decode(codebook.encode(centroids.float())).double()
        error = bins.weight * (centroids - decoded).square() + bins.spread
        return float(error.sum()) / square
