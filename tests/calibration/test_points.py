from __future__ import annotations

import pytest
import torch

from kvq_calibration.points import NormalisedPoints
from kvq_formats.config import KVQConfig


def test_points_without_sensitivity_are_not_called_exact() -> None:
    points = NormalisedPoints()
    z = torch.linspace(-1, 1, 1000)
    points.add(z, torch.zeros(1000, dtype=torch.bool), torch.zeros(1000))
    codebook = points.fit(2, KVQConfig(qnorm=False))
    # Four equal parts of a uniform density: (1/4)^2 / 3 over 1/3.
    assert points.relative_error(codebook) == pytest.approx(1 / 16, rel=0.01)


def test_outliers_are_counted_and_left_out_of_the_fit() -> None:
    inliers = torch.linspace(-1, 1, 999)
    z = torch.cat([inliers, torch.tensor([50.0])])
    alone, mixed = NormalisedPoints(), NormalisedPoints()
    alone.add(inliers, inliers.abs() > 1, None)
    mixed.add(z, z.abs() > 1, None)
    config = KVQConfig()
    assert torch.equal(alone.fit(3, config).entries, mixed.fit(3, config).entries)
    assert mixed.outlier_share == pytest.approx(1 / 1000)
    assert float(mixed.outliers.weight.sum()) == 1
