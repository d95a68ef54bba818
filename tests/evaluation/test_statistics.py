from __future__ import annotations

import math

import pytest
import torch

from kvq_evaluation.statistics import (
    WindowMetrics,
    paired_difference,
    perplexity_increase,
    ratio,
)


def metrics(
    nll: list[float], *, kl: list[float] | None = None, tokens: list[int] | None = None
) -> WindowMetrics:
    tokens = tokens or [10] * len(nll)
    kl = kl or [0.0] * len(nll)
    scores = [(t, n, k, t // 2) for t, n, k in zip(tokens, nll, kl, strict=True)]
    return WindowMetrics.from_scores("variant", scores)


def test_ratio_of_equal_windows_is_the_mean_of_means() -> None:
    means = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    estimate = ratio(means * 10, torch.full((4,), 10))
    assert estimate.mean == pytest.approx(3.0)
    assert estimate.stderr == pytest.approx(float(means.std() / 2))


def test_ratio_weighs_windows_by_their_tokens() -> None:
    # A short last window with the same mean as the rest moves nothing and adds no error.
    estimate = ratio(torch.tensor([20.0, 20.0, 4.0]), torch.tensor([10, 10, 2]))
    assert estimate.mean == pytest.approx(2.0)
    assert estimate.stderr == pytest.approx(0.0, abs=1e-12)
    assert ratio(torch.tensor([20.0, 6.0]), torch.tensor([10, 2])).mean == pytest.approx(26 / 12)


def test_standard_error_covers_repeated_draws() -> None:
    # The spread of the ratio over 2000 independent texts, against what one text says of itself.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, 150, (2000, 20), generator=generator)
    noise = torch.randn(2000, 20, generator=generator, dtype=torch.float64)
    sums = tokens * (3.0 + 0.5 * noise)
    estimates = [ratio(s, t) for s, t in zip(sums, tokens, strict=True)]
    spread = float(torch.tensor([e.mean for e in estimates]).std())
    claimed = sum(e.stderr or 0.0 for e in estimates) / len(estimates)
    # 20 windows estimate a standard error to about 1/sqrt(40) each; 2000 texts to 1/sqrt(4000).
    assert claimed == pytest.approx(spread, rel=0.08)


def test_perplexity_and_its_error() -> None:
    variant = metrics([20.0, 22.0, 24.0])
    estimate = variant.perplexity
    assert estimate.mean == pytest.approx(math.exp(2.2))
    assert estimate.stderr == pytest.approx(math.exp(2.2) * 0.2 / math.sqrt(3))


def test_one_window_has_no_error() -> None:
    variant = metrics([20.0])
    assert variant.perplexity.stderr is None
    assert variant.mean_kl.stderr is None
    assert variant.mean_kl.counts is None


def test_agreement_is_a_share_of_tokens() -> None:
    variant = metrics([1.0, 1.0], tokens=[10, 4])
    assert variant.mean_agreement == pytest.approx(7 / 14)


def test_paired_difference_cancels_what_windows_share() -> None:
    a = metrics([0.0] * 4, kl=[1.0, 5.0, 9.0, 13.0])
    b = metrics([0.0] * 4, kl=[1.2, 5.2, 9.2, 13.2])
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(-0.02)
    assert difference.stderr == pytest.approx(0.0, abs=1e-12)
    assert difference.counts
    assert difference.stderr < (a.mean_kl.stderr or 0)


def test_a_difference_counts_beyond_two_standard_errors() -> None:
    # Differences a token of -1, 0, 1, 2 (mean 0.5, standard error 0.645), then 3, 4, 5, 6.
    b = metrics([0.0] * 4, kl=[0.0] * 4)
    assert paired_difference(metrics([0.0] * 4, kl=[-10.0, 0.0, 10.0, 20.0]), b).counts is False
    assert paired_difference(metrics([0.0] * 4, kl=[30.0, 40.0, 50.0, 60.0]), b).counts is True


def test_paired_difference_against_a_multiple_and_of_nll() -> None:
    a = metrics([10.0, 20.0], kl=[1.0, 2.0])
    b = metrics([8.0, 16.0], kl=[4.0, 6.0])
    assert paired_difference(a, b, factor=0.5).mean == pytest.approx((3.0 - 5.0) / 20)
    assert paired_difference(a, b, metric="nll").mean == pytest.approx(6.0 / 20)


def test_unpaired_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="same windows"):
        paired_difference(metrics([1.0, 2.0]), metrics([1.0, 2.0], tokens=[10, 9]))
    with pytest.raises(ValueError, match="same windows"):
        perplexity_increase(metrics([1.0, 2.0]), metrics([1.0]))


def test_perplexity_increase_by_finite_differences() -> None:
    a, b = metrics([20.0, 23.0, 21.0, 26.0]), metrics([19.0, 22.5, 20.0, 25.0])
    estimate = perplexity_increase(a, b)
    assert estimate.mean == pytest.approx(a.perplexity.mean - b.perplexity.mean)
    # Jackknife of the same statistic: agrees with the delta method to first order.
    leave_one = []
    for out in range(4):
        kept = [i for i in range(4) if i != out]
        parts = [metrics([float(m.nll[i]) for i in kept]) for m in (a, b)]
        leave_one.append(parts[0].perplexity.mean - parts[1].perplexity.mean)
    centre = sum(leave_one) / 4
    jackknife = math.sqrt(3 / 4 * sum((x - centre) ** 2 for x in leave_one))
    assert estimate.stderr == pytest.approx(jackknife, rel=0.2)
