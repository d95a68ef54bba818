from __future__ import annotations

import pytest
import torch

from kvq_calibration.thresholds import KEPT, ChannelQuantiles, center_and_half_range

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("batches", [[1], [2], [700], [255, 1, 256, 257, 31]])
def test_streamed_thresholds_are_exact_quantiles(fraction: float, batches: list[int]) -> None:
    total = sum(batches)
    keys = torch.randn(total, 2, 8, generator=torch.Generator().manual_seed(total)) ** 3
    quantiles = ChannelQuantiles(fraction, total_tokens=total)
    for batch in keys.split(batches):
        quantiles.add(batch)
    lower, upper = quantiles.thresholds()
    tails = torch.tensor([fraction / 2, 1 - fraction / 2], dtype=torch.float64)
    expected = torch.quantile(keys.double(), tails, dim=0)
    # torch interpolates in f64 here and we in f32 between the same two entries.
    bound = 4 * EPS * keys.abs().max()
    assert (lower - expected[0]).abs().max() <= bound
    assert (upper - expected[1]).abs().max() <= bound


def test_memory_stays_put_however_long_the_text() -> None:
    for total in (300_000, 1_000_000, 100_000_000):
        quantiles = ChannelQuantiles(0.01, total_tokens=total)
        # Steps are whole, so that a tail is between half of the room and all of it.
        assert KEPT / 2 <= quantiles.held <= KEPT


def test_a_long_text_is_sampled_evenly() -> None:
    total, fraction = 60_000, 0.2
    keys = torch.arange(total, dtype=torch.float32)[torch.randperm(total)][:, None]
    quantiles = ChannelQuantiles(fraction, total_tokens=total)
    assert quantiles.stride > 1
    for batch in keys.split(777):
        quantiles.add(batch)
    assert quantiles.count == -(-total // quantiles.stride)
    lower, upper = quantiles.thresholds()
    # A quantile of m samples strays by sqrt(p (1 - p) / m); six times that.
    spread = 6 * total * (0.1 * 0.9 / quantiles.count) ** 0.5
    assert float(lower) == pytest.approx(0.1 * total, abs=spread)
    assert float(upper) == pytest.approx(0.9 * total, abs=spread)


def test_no_outliers_means_the_ends() -> None:
    keys = torch.randn(100, 4)
    quantiles = ChannelQuantiles(0.0, total_tokens=100)
    quantiles.add(keys)
    lower, upper = quantiles.thresholds()
    assert torch.equal(lower, keys.amin(0))
    assert torch.equal(upper, keys.amax(0))


def test_a_constant_channel_has_a_range() -> None:
    constant = torch.tensor([0.0, 37.5, -1e-30, 1e30])
    center, half_range = center_and_half_range(constant, constant)
    assert torch.equal(center, constant)
    assert (half_range > 0).all()
    assert (half_range <= constant.abs() * EPS + torch.finfo(torch.float32).tiny).all()


def test_a_channel_of_one_sign_keeps_its_centre() -> None:
    center, half_range = center_and_half_range(torch.tensor([90.0]), torch.tensor([110.0]))
    assert float(center) == 100.0
    assert float(half_range) == 10.0


def test_a_margin_widens_the_range_and_leaves_the_centre() -> None:
    lower, upper = torch.tensor([90.0, -3.0, 5.0]), torch.tensor([110.0, 1.0, 5.0])
    center, half_range = center_and_half_range(lower, upper, margin=1.5)
    assert center.tolist() == [100.0, -1.0, 5.0]
    assert half_range[:2].tolist() == [15.0, 3.0]
    # A channel that never moves stays a rounding step wide.
    assert torch.equal(half_range[2:], center_and_half_range(lower, upper)[1][2:])
