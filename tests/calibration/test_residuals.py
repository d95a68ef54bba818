from __future__ import annotations

import pytest
import torch

from kvq_calibration.residuals import OutlierHistogram, fit_outlier_step
from kvq_formats.codebook import Codebook
from kvq_formats.outliers import quantize_residuals, residual_limits

CODEBOOK = Codebook.fit_grid(torch.linspace(-0.9, 0.9, 8))


def cost(z: torch.Tensor, weight: torch.Tensor, step: float, index_bits: int) -> float:
    """Weighted squared error of storing the residuals with ``step``, one by one."""
    residual = z - CODEBOOK.decode(CODEBOOK.encode(z))
    stored = quantize_residuals(residual, step=step, index_bits=index_bits) * step
    return float((weight * (residual - stored).square()).sum())


@pytest.mark.parametrize("index_bits", [6, 7, 8])
def test_no_step_on_a_fine_grid_is_much_better(index_bits: int) -> None:
    generator = torch.Generator().manual_seed(index_bits)
    z = 1 + torch.rand(5000, generator=generator).pow(-0.7) / 4
    z *= torch.where(torch.rand(5000, generator=generator) < 0.5, -1.0, 1.0)
    weight = torch.rand(5000, generator=generator)
    histogram = OutlierHistogram()
    histogram.add(z, weight)
    step = fit_outlier_step(histogram, CODEBOOK, index_bits=index_bits)
    steps = torch.logspace(-4, 1, 200).tolist()
    best = min(cost(z, weight, s, index_bits) for s in steps)
    # Candidates lie 7 % apart and the cost is about quadratic in the step.
    assert cost(z, weight, step, index_bits) <= 1.15 * best


def test_ordinary_outliers_do_not_saturate() -> None:
    histogram = OutlierHistogram()
    z = torch.linspace(1.0, 3.0, 1000)
    histogram.add(z, torch.ones(1000))
    step = fit_outlier_step(histogram, CODEBOOK, index_bits=6)
    _, limit = residual_limits(6)
    assert 2.1 / limit * 0.98 <= step <= 2.1 / limit * 1.1


def test_no_outliers_give_a_step_all_the_same() -> None:
    assert fit_outlier_step(OutlierHistogram(), CODEBOOK, index_bits=8) > 0
