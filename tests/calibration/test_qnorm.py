from __future__ import annotations

import pytest
import torch

from kvq_calibration.bins import WeightedBins
from kvq_calibration.qnorm import fit_qnorm
from kvq_formats.codebook import Codebook


def test_decoded_inliers_keep_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(200_000, generator=generator) * 0.3 + 0.1).clamp(-1, 1)
    bins = WeightedBins()
    bins.add(a, None)
    entries = torch.tensor([-0.4, -0.1, 0.15, 0.4])
    scale, shift = fit_qnorm(bins, entries)
    codes = Codebook.fit_grid(entries).encode(a)
    b = entries[codes.long()].double() * scale + shift
    # A point can only be misplaced inside the three bins that hold midpoints.
    misplaced = 3 * bins.width * 2
    assert float(b.mean()) == pytest.approx(float(a.double().mean()), abs=misplaced)
    assert float(b.std()) == pytest.approx(float(a.double().std()), abs=misplaced)
    assert scale != pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("points", [[], [0.25], [0.25] * 50])
def test_points_without_deviation_only_shift(points: list[float]) -> None:
    bins = WeightedBins()
    bins.add(torch.tensor(points), None)
    scale, shift = fit_qnorm(bins, torch.tensor([-0.5, 0.0, 0.3, 0.9]))
    assert scale == 1.0
    assert shift == pytest.approx(-0.05 if points else 0.0, abs=1e-6)
