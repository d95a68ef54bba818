"""Q-Norm: shift and scale decoded entries so that they keep the inliers' mean and deviation.

From the method's first version (arXiv 2401.18079v1): with inliers ``a`` and their quantized ``b``,
``qnorm_scale = std(a) / std(b)`` and ``qnorm_shift = mean(a) - mean(b) * qnorm_scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calibration.kmeans import WeightedBins


def fit_qnorm(bins: WeightedBins, entries: Tensor) -> tuple[float, float]:
    """``(qnorm_scale, qnorm_shift)`` from unweighted bins of the normalised inliers.

    Args:
        bins: counts and moments of the inliers.
        entries: plain codebook f32 ``[N]``; codes are chosen with it.
    """
    count = bins.total_weight
    if count == 0:
        return 1.0, 0.0
    weight, centroids = bins.weight / count, bins.centroids
    codes = torch.bucketize(centroids, (entries[1:] + entries[:-1]).double() / 2)
    quantized = entries.double()[codes]
    mean, quantized_mean = (weight * centroids).sum(), (weight * quantized).sum()
    variance = bins.total_square / count - mean.square()
    quantized_variance = (weight * (quantized - quantized_mean).square()).sum()
    if quantized_variance <= 0 or variance <= 0:
        return 1.0, float(mean - quantized_mean)
    scale = (variance / quantized_variance).sqrt()
    return float(scale), float(mean - quantized_mean * scale)
