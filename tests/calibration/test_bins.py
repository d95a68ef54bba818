"""WeightedBins: moments against sums over the points, independence of batches, bad numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_calibration import bins as bins_module
from kvq_calibration.bins import WeightedBins, weighted_error
from kvq_formats.errors import CalibrationError

EPS = torch.finfo(torch.float64).eps
NAN, INF = float("nan"), float("inf")


def weighted_points(num: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points f32 ``[num]`` within [-1, 1] and weights f32 over some eight orders of magnitude."""
    source = torch.Generator().manual_seed(seed)
    z = (torch.randn(num, generator=source) / 3).clamp(-1, 1)
    return z, torch.exp(4 * torch.randn(num, generator=source))


def filled(z: Tensor, weight: Tensor | None, *, num_bins: int = 4096) -> WeightedBins:
    bins = WeightedBins(num_bins)
    bins.add(z, weight)
    return bins


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(
    points=st.lists(
        st.tuples(
            st.floats(-1, 1, width=32),
            st.floats(0, 2.0**60, width=32, allow_subnormal=False),
        ),
        max_size=40,
    ),
    num_bins=st.sampled_from([1, 2, 3, 16, 1000]),
)
def test_moments_are_those_of_the_points(points: list[tuple[float, float]], num_bins: int) -> None:
    z, weight = torch.tensor(points, dtype=torch.float32).reshape(-1, 2).T
    bins = filled(z, weight, num_bins=num_bins)
    z, weight = z.double(), weight.double()
    total = float(weight.sum())
    # One rounding a point and sum, few more for the products, all of terms within [-1, 1].
    tolerance = 4 * (len(points) + num_bins + 4) * EPS * total
    assert bins.total_weight == pytest.approx(total, rel=0, abs=tolerance)
    assert float(bins.weight @ bins.centroids) == pytest.approx(
        float(weight @ z), rel=0, abs=tolerance
    )
    assert bins.total_square == pytest.approx(float(weight @ z**2), rel=0, abs=tolerance)


def test_each_bin_holds_its_own_points() -> None:
    # Four bins of width 0.5; an edge belongs to the bin on its right, 1 to the last one.
    z = torch.tensor([-1.0, -0.75, -0.5, 0.0, 0.25, 1.0])
    bins = filled(z, torch.tensor([1.0, 3.0, 5.0, 1.0, 1.0, 7.0]), num_bins=4)
    assert bins.weight.tolist() == [4, 5, 2, 7]
    assert bins.centroids.tolist() == [-0.8125, -0.5, 0.125, 1.0]
    # 1 * (3/16)^2 + 3 * (1/16)^2 and 2 * (1/8)^2
    assert bins.spread.tolist() == [12 / 256, 0, 2 / 64, 0]


def test_an_empty_bin_has_its_centre_for_a_centroid() -> None:
    assert WeightedBins(4).centroids.tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert WeightedBins(4).total_square == 0


@pytest.mark.parametrize("batch", [1, 7, 1000, 40_000])
def test_batches_change_no_bit(batch: int) -> None:
    z, weight = weighted_points(2000 if batch == 1 else 100_000)
    pieces = WeightedBins()
    for start in range(0, len(z), batch):
        pieces.add(z[start : start + batch], weight[start : start + batch])
    assert torch.equal(pieces.moments, filled(z, weight).moments)


@pytest.mark.parametrize("chunk", [100, 65_536, 1_000_000])
def test_chunks_change_no_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, weight = weighted_points(100_000)
    expected = filled(z, weight).moments
    monkeypatch.setattr(bins_module, "CHUNK", chunk)
    assert torch.equal(filled(z, weight).moments, expected)


def test_threads_change_no_bit(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    z, weight = weighted_points(300_000)
    # A single chunk, large enough for torch to share it out among threads.
    monkeypatch.setattr(bins_module, "CHUNK", len(z))
    several = filled(z, weight).moments
    torch.set_num_threads(1)
    assert torch.equal(several, filled(z, weight).moments)


def test_no_weight_counts_every_point_once() -> None:
    z, _ = weighted_points(70_000)
    assert torch.equal(filled(z, None).moments, filled(z, torch.ones_like(z)).moments)


def test_merge_equals_add() -> None:
    z, weight = weighted_points(10_000)
    merged = filled(z[:3000], weight[:3000])
    merged.merge(filled(z[3000:], weight[3000:]))
    expected = filled(z, weight).moments
    # All terms are positive: one rounding a point at most, relative to the sum.
    assert torch.allclose(merged.moments, expected, rtol=len(z) * EPS, atol=0)


def test_only_the_same_grid_merges() -> None:
    with pytest.raises(ValueError, match="cannot merge 8 bins into 4"):
        WeightedBins(4).merge(WeightedBins(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_taken_at_their_values(dtype: torch.dtype) -> None:
    z, weight = (x.clamp(max=1000).to(dtype) for x in weighted_points(1000))
    assert torch.equal(filled(z, weight).moments, filled(z.double(), weight.double()).moments)


def test_shapes_strides_and_gradients_are_of_no_concern() -> None:
    z, weight = weighted_points(1200)
    z.requires_grad_()
    bins = filled(z.reshape(30, 4, 10).transpose(0, 2), weight.reshape(30, 4, 10).transpose(0, 2))
    assert not bins.moments.requires_grad
    assert bins.total_weight == pytest.approx(float(weight.double().sum()), rel=1200 * EPS)


@pytest.mark.parametrize("largest", [1.0, 1.5])
def test_inputs_are_left_as_they_were(largest: float) -> None:
    z, weight = (x.double() for x in weighted_points(1000))
    z[0] = largest
    before = z.clone(), weight.clone()
    filled(z, weight)
    assert torch.equal(z, before[0])
    assert torch.equal(weight, before[1])


def test_points_beyond_the_range_move_to_its_ends() -> None:
    inside = filled(torch.tensor([-1.0, 1.0]), None)
    assert torch.equal(filled(torch.tensor([-1.0000001, 3e38]), None).moments, inside.moments)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 40_000])
def test_a_bad_activation_is_refused(bad: float, position: int) -> None:
    z, weight = weighted_points(50_000)
    z[position] = bad
    with pytest.raises(CalibrationError, match="NaN or infinity") as caught:
        filled(z, weight)
    assert "--dtype" in (caught.value.hint or "")


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1e-3])
@pytest.mark.parametrize("position", [0, 40_000])
def test_a_bad_sensitivity_is_refused(bad: float, position: int) -> None:
    z, weight = weighted_points(50_000)
    weight[position] = bad
    with pytest.raises(CalibrationError, match="sensitivities range from"):
        filled(z, weight)


def test_sensitivities_that_overflow_together_are_refused() -> None:
    with pytest.raises(CalibrationError, match="add up to infinity"):
        filled(torch.tensor([-0.5, 0.5]), torch.tensor([1.5e308, 1.5e308], dtype=torch.float64))


def test_a_weight_for_each_point() -> None:
    with pytest.raises(ValueError, match="z is \\(3,\\), but weight is \\(2,\\)"):
        filled(torch.zeros(3), torch.ones(2))


@pytest.mark.parametrize("num_bins", [16, 4096])
def test_weighted_error_bounds_that_of_the_points(num_bins: int) -> None:
    z, weight = weighted_points(20_000)
    bins = filled(z, weight, num_bins=num_bins)
    entries = torch.tensor([-0.7, -0.21, 0.03, 0.37, 0.9])
    distances = (z.double()[:, None] - entries.double()).abs().amin(dim=1)
    exact = float(weight.double() @ distances**2)
    midpoints = (entries[1:] + entries[:-1]) / 2
    cut = bins.weight[((midpoints + 1) / bins.width).long()]
    slack = float((cut * bins.width * entries.double().diff()).sum()) / 2
    rounding = len(z) * EPS * bins.total_weight
    assert exact - rounding <= weighted_error(bins, entries) <= exact + slack + rounding
