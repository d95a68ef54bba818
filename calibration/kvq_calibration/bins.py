"""Any number of weighted points on [-1, 1], kept as three moments a bin.

One-dimensional k-means needs of its points only how much weight lies where. Binning makes the
memory of a codebook fit independent of the number of activations, lets batches be added as they
come, and leaves the fit itself a few thousand numbers to work on (``kvq_calibration.kmeans``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_formats.errors import CalibrationError

NUM_BINS = 4096
"""Default grid: a bin is 1/2048 wide, some two hundred times narrower than a 3-bit codebook's
step."""

# Temporaries of one chunk (index, offset and mass, 8 bytes each) stay in a core's second-level
# cache, and torch runs elementwise work of up to 32768 numbers without waking other threads.
CHUNK = 32768


class WeightedBins:
    """Weighted points on a uniform grid over [-1, 1].

    Fields:
        moments: f64 ``[3, num_bins]``: a bin's weight, first and second moment. Moments are taken
            about the bin's lower edge and in bin widths, so that they are exact to the last bits
            of f64 wherever the bin lies; ``centroids`` and ``spread`` give them in units of z.

    Points are added one after the other, in the order given: however they are cut into batches
    or chunks, and whatever the number of threads, the same points give the same bits.
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be positive, found {num_bins}")
        self.moments = torch.zeros(3, num_bins, dtype=torch.float64)

    @property
    def num_bins(self) -> int:
        """Number of bins of the grid."""
        return self.moments.shape[1]

    @property
    def width(self) -> float:
        """Width of a bin, in units of z."""
        return 2.0 / self.num_bins

    @property
    def weight(self) -> Tensor:
        """Weight of each bin, f64 ``[num_bins]``."""
        return self.moments[0]

    @property
    def centroids(self) -> Tensor:
        """Weighted mean of each bin's points, f64 ``[num_bins]``; the centre of an empty bin."""
        weight, first, _ = self.moments
        offset = torch.where(weight > 0, first / weight, 0.5)
        return (torch.arange(self.num_bins) + offset) * self.width - 1

    @property
    def spread(self) -> Tensor:
        """Sum of weight * (z - the bin's centroid)^2 of each bin, f64 ``[num_bins]``."""
        weight, first, second = self.moments
        about_centroid = second - torch.where(weight > 0, first * first / weight, 0.0)
        return about_centroid.clamp(min=0) * self.width**2

    @property
    def total_weight(self) -> float:
        """Sum of the weights of all points."""
        return float(self.weight.sum())

    @property
    def total_square(self) -> float:
        """Sum of weight * z^2 over all points, from the moments."""
        return float((self.weight * self.centroids**2 + self.spread).sum())

    @torch.no_grad()
    def add(self, z: Tensor, weight: Tensor | None) -> None:
        """Accumulate points.

        Args:
            z: normalised inliers, any float dtype and shape, on the CPU. What lies beyond [-1, 1]
                is moved to the nearer end.
            weight: as many numbers, any float dtype, finite and not negative; None for one each.

        Raises:
            CalibrationError: NaN or infinity in ``z`` or ``weight``, or a negative weight. The
                bins then hold a part of the points and are of no further use.
        """
        if weight is not None and weight.shape != z.shape:
            raise ValueError(f"z is {tuple(z.shape)}, but weight is {tuple(weight.shape)}")
        z = z.reshape(-1)
        if weight is None:
            weight = torch.ones((), dtype=torch.float64).expand(z.shape)
        weight = weight.reshape(-1)
        for start in range(0, len(z), CHUNK):
            self._add_chunk(z[start : start + CHUNK], weight[start : start + CHUNK])
        if not self.total_weight < torch.inf:
            raise CalibrationError("sensitivities add up to infinity; expected a finite sum")

    def _add_chunk(self, z: Tensor, weight: Tensor) -> None:
        """Accumulate ``[n]`` points and as many weights."""
        lowest, highest = (float(x) for x in torch.aminmax(z))
        # Comparisons with NaN are false; infinity minus itself is NaN.
        if not highest - lowest < torch.inf:
            raise CalibrationError(
                "normalised activations contain NaN or infinity; expected finite numbers",
                hint="--dtype bfloat16 or float32",
            )
        lightest, heaviest = (float(x) for x in torch.aminmax(weight))
        if not (lightest >= 0 and heaviest < torch.inf):
            raise CalibrationError(
                f"sensitivities range from {lightest} to {heaviest}; "
                "expected finite numbers that are not negative",
                hint="--dtype bfloat16 or float32",
            )
        if lowest < -1 or highest > 1:
            z = z.clamp(-1, 1)
        # In f64 the bin's edges are exact, and so is what is left after subtracting one.
        offset = z.to(torch.float64, copy=True).add_(1).mul_(self.num_bins / 2)
        # z = 1 belongs to the last bin.
        index = offset.long().clamp_(max=self.num_bins - 1)
        offset.sub_(index)
        mass = weight.to(torch.float64, copy=True)
        # One-dimensional scatter_add_ on the CPU adds one element after the other.
        self.moments[0].scatter_add_(0, index, mass)
        self.moments[1].scatter_add_(0, index, mass.mul_(offset))
        self.moments[2].scatter_add_(0, index, mass.mul_(offset))

    def merge(self, other: WeightedBins) -> None:
        """Accumulate the points of bins of the same grid; equals ``add`` up to f64 rounding."""
        if other.num_bins != self.num_bins:
            raise ValueError(f"cannot merge {other.num_bins} bins into {self.num_bins}")
        self.moments += other.moments


def weighted_error(bins: WeightedBins, entries: Tensor) -> float:
    """Sum of weight * (z - nearest entry)^2 over all points, from the moments.

    A bin whose points lie on both sides of a midpoint goes to one entry as a whole, the one nearer
    to its centroid. So this is an upper bound of the error on the points themselves, above it by
    at most weight * width * gap / 2 in each bin that a midpoint cuts (gap: between the entries on
    both sides).

    Args:
        entries: ``[N]``, sorted.
    """
    entries = entries.double()
    centroids = bins.centroids
    nearest = entries[torch.bucketize(centroids, (entries[1:] + entries[:-1]) / 2)]
    return float((bins.weight * (centroids - nearest) ** 2 + bins.spread).sum())
