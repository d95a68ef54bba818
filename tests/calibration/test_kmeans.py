"""The exact solver against every partition, and against scikit-learn as an independent judge."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_calibration.kmeans import (
    WeightedBins,
    fit_codebook,
    fit_codebook_sklearn,
    weighted_error,
)

EPS = np.finfo(np.float64).eps
Fit = Callable[[WeightedBins, int], Tensor]
FITS: list[Fit] = [fit_codebook, fit_codebook_sklearn]


def filled(z: Tensor, weight: Tensor | None, *, num_bins: int = 4096) -> WeightedBins:
    bins = WeightedBins(num_bins)
    bins.add(z, weight)
    return bins


def least_error(bins: WeightedBins, num_entries: int) -> float:
    """Smallest error over all ways to cut the occupied bins into intervals, one by one."""
    held = bins.weight > 0
    weight, centroids = bins.weight[held].numpy(), bins.centroids[held].numpy()
    errors = []
    for cuts in combinations(range(1, len(weight)), num_entries - 1):
        error = 0.0
        for start, end in pairwise([0, *cuts, len(weight)]):
            w, x = weight[start:end], centroids[start:end]
            error += float(w @ (x - w @ x / w.sum()) ** 2)
        errors.append(error)
    return min(errors) + float(bins.spread.sum())


def raw_error(z: Tensor, weight: Tensor, entries: Tensor) -> float:
    """Weighted squared error on the points themselves."""
    nearest = entries[torch.bucketize(z, (entries[1:] + entries[:-1]) / 2)]
    return float(weight.double() @ (z.double() - nearest.double()) ** 2)


def is_codebook(entries: Tensor, num_entries: int) -> bool:
    return (
        entries.dtype == torch.float32
        and entries.shape == (num_entries,)
        and bool((entries.diff() > 0).all())
        and bool((entries.abs() <= 1).all())
    )


@given(
    weights=st.lists(
        st.one_of(st.just(0.0), st.floats(2.0**-20, 2.0**20)), min_size=1, max_size=11
    ),
    num_entries=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_no_partition_is_better(weights: list[float], num_entries: int, seed: int) -> None:
    num_bins = len(weights)
    # Two points a bin, so that centroids lie anywhere in it and the spread is not zero.
    within = torch.rand(2, num_bins, generator=torch.Generator().manual_seed(seed)).double()
    z = (torch.arange(num_bins) + within) * 2 / num_bins - 1
    weight = torch.tensor(weights, dtype=torch.float64).expand(2, -1)
    bins = filled(z, weight, num_bins=num_bins)
    entries = fit_codebook(bins, num_entries)
    assert is_codebook(entries, num_entries)
    if int((bins.weight > 0).sum()) <= num_entries:
        best = float(bins.spread.sum())
    else:
        best = least_error(bins, num_entries)
    # Each prefix sum is a rounded sum of at most num_bins terms, and gains weigh their errors with
    # means within 2 of each other; entries are rounded to f32, which costs weight * (2^-24)^2.
    tolerance = (16 * num_bins * EPS + 2.0**-48) * bins.total_weight
    assert weighted_error(bins, entries) <= best + tolerance


def test_more_bins_than_one_level_of_the_search() -> None:
    source = torch.Generator().manual_seed(1)
    z = torch.rand(4000, generator=source) * 2 - 1
    weight = torch.exp(3 * torch.randn(4000, generator=source))
    bins = filled(z, weight, num_bins=70)
    tolerance = (16 * 70 * EPS + 2.0**-48) * bins.total_weight
    for num_entries in (2, 3, 4):
        found = weighted_error(bins, fit_codebook(bins, num_entries))
        assert found <= least_error(bins, num_entries) + tolerance


def clouds() -> dict[str, tuple[Tensor, Tensor]]:
    """Weighted points f32 of the shapes that normalised activations come in."""
    source = torch.Generator().manual_seed(3)
    num = 20_000
    normal = torch.randn(num, generator=source)
    heavy = normal / torch.randn(num, 3, generator=source).square().mean(dim=1).sqrt()
    bimodal = 0.15 * normal + torch.where(torch.rand(num, generator=source) < 0.3, -0.6, 0.5)
    # Squared gradients: chi-square, times a scale a channel over orders of magnitude.
    squares = torch.randn(num, generator=source).square()
    scales = torch.exp(3 * torch.randn(num, generator=source))
    return {
        "normal": ((normal / 2.6).clamp(-1, 1), torch.ones(num)),
        "normal, weighted": ((normal / 2.6).clamp(-1, 1), squares * scales * 1e-12),
        "heavy tails, weighted": ((heavy / 12).clamp(-1, 1), squares * scales),
        "largest value far out": (heavy / heavy.abs().max(), squares),
        "two modes, weighted": (bimodal.clamp(-1, 1), squares * scales),
        "weight grows with size": ((heavy / 8).clamp(-1, 1), heavy.square() * squares),
    }


@pytest.mark.parametrize("num_entries", [4, 8, 16])
@pytest.mark.parametrize("cloud", clouds())
def test_never_worse_than_sklearn_on_the_points(cloud: str, num_entries: int) -> None:
    from sklearn.cluster import KMeans

    z, weight = clouds()[cloud]
    judge = KMeans(n_clusters=num_entries, n_init=3, max_iter=50, random_state=0)
    judge.fit(z[:, None].numpy(), sample_weight=(weight / weight.mean()).numpy())
    theirs = torch.from_numpy(np.sort(judge.cluster_centers_[:, 0]))
    ours = fit_codebook(filled(z, weight), num_entries)
    assert is_codebook(ours, num_entries)
    assert raw_error(z, weight, ours) <= 1.001 * raw_error(z, weight, theirs)


@pytest.mark.parametrize("num_entries", [4, 8, 16])
@pytest.mark.parametrize("cloud", clouds())
def test_sklearn_option_is_a_local_optimum_beside_the_exact_one(
    cloud: str, num_entries: int
) -> None:
    bins = filled(*clouds()[cloud])
    theirs = fit_codebook_sklearn(bins, num_entries)
    assert is_codebook(theirs, num_entries)
    exact = weighted_error(bins, fit_codebook(bins, num_entries))
    assert weighted_error(bins, theirs) >= exact - 1e-12 * bins.total_weight
    # Lloyd's condition: an entry is the mean of the bins that are nearer to it than to others.
    owner = torch.bucketize(bins.centroids, (theirs[1:] + theirs[:-1]).double() / 2)
    weight = torch.zeros(num_entries, dtype=torch.float64).index_add(0, owner, bins.weight)
    first = torch.zeros(num_entries, dtype=torch.float64).index_add(
        0, owner, bins.weight * bins.centroids
    )
    # scikit-learn stops when its labels stand still or its entries move by less than
    # sqrt(1e-4 * variance) in all; a bin may yet change sides.
    moved = float((first / weight - theirs).norm())
    assert moved <= (1e-4 * float(bins.centroids.var())) ** 0.5


@pytest.mark.parametrize("fit", FITS)
def test_the_same_points_give_the_same_bits(fit: Fit) -> None:
    z, weight = clouds()["heavy tails, weighted"]
    assert torch.equal(fit(filled(z, weight), 8), fit(filled(z, weight), 8))


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1000])
def test_the_unit_of_the_weights_does_not_matter(scale: float) -> None:
    z, weight = clouds()["heavy tails, weighted"]
    expected = fit_codebook(filled(z, weight), 8)
    assert torch.equal(fit_codebook(filled(z, weight.double() * scale), 8), expected)


def test_one_weight_above_all_others_hides_none_of_them() -> None:
    z = torch.tensor([0.5, -0.9, -0.3, 0.1, 0.95])
    weight = torch.tensor([1e12, 1.0, 1.0, 1.0, 1.0])
    assert fit_codebook(filled(z, weight), 4).tolist() == pytest.approx([-0.9, -0.1, 0.5, 0.95])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("num_entries", [1, 4, 8, 16])
def test_no_weight_gives_a_uniform_codebook(fit: Fit, num_entries: int) -> None:
    for bins in (WeightedBins(), filled(torch.tensor([0.3, -0.2]), torch.zeros(2))):
        entries = fit(bins, num_entries)
        assert is_codebook(entries, num_entries)
        uniform = (2 * torch.arange(num_entries) + 1) / num_entries - 1
        assert torch.equal(entries, uniform)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "points",
    [[0.0], [1.0], [-1.0], [0.3], [-1.0, 1.0], [0.25, 0.25, -0.5], [-0.9, -0.2, 0.1, 0.6, 1.0]],
)
@pytest.mark.parametrize("num_entries", [8, 16])
def test_every_one_of_few_points_gets_an_entry(
    fit: Fit,
    points: list[float],
    num_entries: int,
) -> None:
    z = torch.tensor(points)
    entries = fit(filled(z, None), num_entries)
    assert is_codebook(entries, num_entries)
    # A centroid is rounded once in f64, then to f32: an ulp of f32 below 1.
    assert all(bool((entries - point).abs().min() <= 2.0**-24) for point in z)


def test_as_many_points_as_entries() -> None:
    z = torch.tensor([-0.75, -0.5, 0.125, 1.0])
    assert torch.equal(fit_codebook(filled(z, torch.tensor([1.0, 9.0, 1e-9, 2.0])), 4), z)


def test_points_of_two_bins_that_are_one_number_in_f32() -> None:
    # Either side of the edge at 0.5, nearer to it than an f32 can tell.
    z = torch.tensor([0.5 - 1e-12, 0.5, -0.25], dtype=torch.float64)
    entries = fit_codebook(filled(z, None), 3)
    assert is_codebook(entries, 3)
    assert {-0.25, 0.5} <= set(entries.tolist())
