"""Weighted one-dimensional k-means: one codebook of a layer's keys or values.

Clusters of a line are intervals, so the optimum is a choice of ``N - 1`` cuts between bins and
dynamic programming finds it: ``best[k][j]``, the best ``k`` intervals of the first ``j`` bins,
takes its last interval from the best ``k - 1`` of the first ``i``. The best ``i`` never moves left
as ``j`` moves right, so each ``k`` costs O(bins log bins) by divide and conquer (Wu 1991, Grønlund
et al. 2017). No restarts, no seed. KVQuant, section 3.3, clusters the activations weighted with
their sensitivities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvq_calibration.bins import WeightedBins, weighted_error

__all__ = ["WeightedBins", "fit_codebook", "fit_codebook_sklearn", "weighted_error"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def fit_codebook(bins: WeightedBins, num_entries: int) -> Tensor:
    """Entries that minimise the weighted squared error, the exact optimum over bin edges.

    Returns:
        f32 ``[N]``, strictly increasing, within [-1, 1]. Where fewer than ``N`` bins hold points
        each gets an entry and the rest go into the widest gaps; without any weight entries are
        uniform.
    """
    weight, centroids = _occupied(bins)
    if len(weight) <= num_entries:
        return _as_codebook(centroids, num_entries)
    starts = _optimal_starts(weight, centroids, num_entries)
    return _as_codebook(_means(weight, centroids, starts), num_entries)


def fit_codebook_sklearn(bins: WeightedBins, num_entries: int, *, seed: int = 0) -> Tensor:
    """The same by scikit-learn's ``KMeans`` on the bins' centroids: the best of ten restarts.

    Returns:
        f32 ``[N]`` as ``fit_codebook``; a local optimum that depends on ``seed``.
    """
    from sklearn.cluster import KMeans

    weight, centroids = _occupied(bins)
    if len(weight) <= num_entries:
        return _as_codebook(centroids, num_entries)
    judge = KMeans(n_clusters=num_entries, n_init=10, max_iter=300, random_state=seed)
    judge.fit(centroids[:, None], sample_weight=weight)
    # Means are taken here: the sums of its threads come in no fixed order, their partition holds.
    entries = np.sort(judge.cluster_centers_[:, 0])
    starts = np.searchsorted(centroids, (entries[1:] + entries[:-1]) / 2)
    return _as_codebook(_means(weight, centroids, np.unique([0, *starts])), num_entries)


def _occupied(bins: WeightedBins) -> tuple[Floats, Floats]:
    """Weights, scaled to a sum of one, and centroids of the bins that hold any, left to right."""
    weight = bins.weight.numpy()
    total = weight.sum()
    share = weight / total if total > 0 else weight
    # A weight that vanishes beside the total counts as none.
    held = share > np.finfo(np.float64).tiny
    return share[held], bins.centroids.numpy()[held]


def _means(weight: Floats, centroids: Floats, starts: Indices) -> Floats:
    """Weighted mean of each interval of bins; ``starts`` are their first bins, increasing."""
    return np.add.reduceat(weight * centroids, starts) / np.add.reduceat(weight, starts)


@dataclass(frozen=True)
class _Prefix:
    """Prefix sums over n bins, f64 ``[n + 1]``: weight, and first moment about the mean."""

    weight: Floats
    first: Floats

    def gain(self, i: Indices, j: Indices) -> Floats:
        """Error that one entry for the bins i, ..., j - 1 saves against none: S1^2 / S0.

        Prefix sums are rounded to ulps of the total weight (one), each bin adding its own, so a
        gain is wrong by 1e-12 at worst: a thousandth of a bin's width, squared, times the total
        weight. An interval lighter than an ulp is rounding noise and must not be divided by.
        """
        first = self.first[j] - self.first[i]
        weight = self.weight[j] - self.weight[i]
        return first * first / np.maximum(weight, np.finfo(np.float64).eps)


def _optimal_starts(weight: Floats, centroids: Floats, num_entries: int) -> Indices:
    """First bin of each of the best ``num_entries`` intervals, i64 ``[N]``.

    The error of an interval is S2 - S1^2 / S0 and the sum of S2 is the same for all cuts, so it is
    the sum of S1^2 / S0 that is maximised.
    """
    num_bins = len(weight)
    about_mean = centroids - weight @ centroids
    prefix = _Prefix(
        weight=np.concatenate([[0.0], np.cumsum(weight)]),
        first=np.concatenate([[0.0], np.cumsum(weight * about_mean)]),
    )
    ends = np.arange(num_bins + 1)
    best = prefix.gain(np.zeros_like(ends), ends)
    cuts = []
    for num_intervals in range(2, num_entries + 1):
        best, cut = _one_more_interval(prefix, best, num_intervals)
        cuts.append(cut)
    starts = [num_bins]
    for cut in reversed(cuts):
        starts.append(cut[starts[-1]])
    return np.array([0, *starts[:0:-1]])


def _one_more_interval(prefix: _Prefix, best: Floats, num_intervals: int) -> tuple[Floats, Indices]:
    """One row of the dynamic programme.

    Args:
        best: f64 ``[n + 1]``; ``best[j]`` is the largest gain of the first j bins in
            ``num_intervals - 1`` intervals. What stands below ``j = num_intervals - 1`` is not
            read.

    Returns:
        The same for ``num_intervals``, and i64 ``[n + 1]`` where its last interval starts.
    """
    n = len(best) - 1
    first_end = num_intervals
    num_ends = n - first_end + 1
    # cut[p] belongs to the end first_end - 1 + p; the outer two are bounds for their neighbours.
    cut = np.empty(num_ends + 2, dtype=np.int64)
    cut[0], cut[-1] = num_intervals - 1, n - 1
    gain = np.zeros(num_ends + 2)
    # Ends at odd multiples of the stride, all at once, between the cuts of their neighbours at
    # even multiples. Neighbours share a cut at most, so a level looks at O(n) candidates.
    stride = 1 << num_ends.bit_length()
    while stride := stride // 2:
        place = np.arange(stride, num_ends + 1, 2 * stride)
        end = place + (first_end - 1)
        lowest = cut[place - stride]
        highest = np.minimum(cut[np.minimum(place + stride, num_ends + 1)], end - 1)
        count = highest - lowest + 1
        offset = np.cumsum(count) - count
        owner = np.repeat(np.arange(len(place)), count)
        candidate = np.arange(len(owner)) + (lowest - offset)[owner]
        value = best[candidate] + prefix.gain(candidate, end[owner])
        gain[place] = np.maximum.reduceat(value, offset)
        # The leftmost of equals: the last write wins, so write from the right.
        winner = np.flatnonzero(value == gain[place][owner])[::-1]
        cut[place[owner[winner]]] = candidate[winner]
    pad = np.zeros(first_end - 1)
    return np.concatenate([pad, gain[:-1]]), np.concatenate([pad.astype(np.int64), cut[:-1]])


def _as_codebook(entries: Floats, num_entries: int) -> Tensor:
    """f32 ``[N]``, strictly increasing: equals fall together and the widest gaps are halved."""
    if len(entries) == 0:
        # No weight at all: uniform, the middles of N equal parts.
        entries = (2 * np.arange(num_entries) + 1) / num_entries - 1
    distinct = np.unique(entries.astype(np.float32))
    while len(distinct) < num_entries:
        edges = np.unique(np.concatenate([[-1.0], distinct, [1.0]]).astype(np.float32))
        gap = int(np.argmax(np.diff(edges)))
        middle = (edges[gap] + edges[gap + 1]) / 2
        distinct = np.unique(np.append(distinct, middle))
    return torch.from_numpy(distinct)
