from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_evaluation.statistics import (
    WindowMetrics,
    over_seeds,
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


def seeds(*kl: list[float], tokens: list[int] | None = None) -> list[WindowMetrics]:
    """One run a calibration seed, by the KL sums of its windows."""
    return [metrics([0.0] * len(sums), kl=sums, tokens=tokens) for sums in kl]


def test_seeds_by_hand() -> None:
    """Windows of 10 tokens: 0.1 and 0.3 of the first seed, 0.3 and 0.5 of the second.

    Windows' means over the seeds are 0.2 and 0.4, standard error 0.1; so are the seeds' means over
    the windows, 0.2 and 0.4, standard error 0.1. Together: the root of 0.02.
    """
    estimate = over_seeds(seeds([1.0, 3.0], [3.0, 5.0]))
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.stderr == pytest.approx(math.sqrt(0.02))


def test_seeds_that_agree_on_average_still_leave_the_windows() -> None:
    # Windows' means over the seeds 0.2 and 0.4 once more, seeds' means 0.3 both.
    estimate = over_seeds(seeds([1.0, 5.0], [3.0, 3.0]))
    assert estimate.stderr == pytest.approx(0.1)


def test_windows_that_agree_on_average_still_leave_the_seeds() -> None:
    # Windows' means over the seeds 0.3 both; seeds' means 0.2, 0.3 and 0.4, standard error 0.1 by
    # the root of 3.
    estimate = over_seeds(seeds([2.0, 2.0], [1.0, 5.0], [6.0, 2.0]))
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.stderr == pytest.approx(0.1 / math.sqrt(3))


def test_one_window_leaves_the_error_over_seeds_unknown() -> None:
    estimate = over_seeds(seeds([1.0], [3.0]))
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.stderr is None


def test_seeds_on_other_windows_are_refused() -> None:
    runs = seeds([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same windows"):
        over_seeds([*runs, metrics([0.0, 0.0], kl=[1.0, 2.0], tokens=[10, 9])])


SUMS = st.floats(0.0, 100.0)


@st.composite
def several_seeds(draw: st.DrawFn) -> list[WindowMetrics]:
    windows = draw(st.integers(2, 5))
    tokens = draw(st.lists(st.integers(1, 50), min_size=windows, max_size=windows))
    sums = st.lists(SUMS, min_size=windows, max_size=windows)
    return seeds(*draw(st.lists(sums, min_size=1, max_size=4)), tokens=tokens)


@given(several_seeds())
def test_seeds_only_add_to_the_error_of_windows(runs: list[WindowMetrics]) -> None:
    estimate = over_seeds(runs)
    means = [run.mean_kl.mean for run in runs]
    assert estimate.mean == pytest.approx(sum(means) / len(means))
    total = torch.stack([run.kl for run in runs]).mean(0)
    windows = ratio(total, runs[0].tokens).stderr
    # Their squares lose half of the digits.
    tolerance = 1e-6 * max(means)
    assert estimate.stderr >= windows - tolerance
    spread = max(means) - min(means)
    assert estimate.stderr <= windows + spread + tolerance
    assert over_seeds(runs[::-1]).stderr == pytest.approx(estimate.stderr, abs=tolerance)
    # One seed, or the same seed again, is worth no more than its windows.
    for same in (runs[:1], runs[:1] * 3):
        alone = runs[0].mean_kl
        assert over_seeds(same).mean == pytest.approx(alone.mean)
        assert over_seeds(same).stderr == pytest.approx(alone.stderr, abs=tolerance)


def test_the_error_over_seeds_covers_repeated_draws() -> None:
    # Windows and seeds each shift the KL by their own amount; 800 studies of 16 windows, 4 seeds.
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(800, 1, 16, generator=generator, dtype=torch.float64)
    lucky = torch.randn(800, 4, 1, generator=generator, dtype=torch.float64)
    sums = 10 * (5 + 0.5 * hard + 0.4 * lucky)
    estimates = [over_seeds(seeds(*study.tolist())) for study in sums]
    variance = float(torch.tensor([e.mean for e in estimates]).var())
    claimed = sum((e.stderr or 0.0) ** 2 for e in estimates) / len(estimates)
    # A variance of 800 draws is known to the root of 2 / 800, 5 %; three of these.
    assert claimed == pytest.approx(variance, rel=0.15)


def of_tokens(kl: list[float]) -> WindowMetrics:
    """One window, its tokens in two pieces as batches hand them over."""
    values = torch.tensor(kl)
    scores = [(len(kl), 0.0, float(values.sum()), 0)]
    return WindowMetrics.from_scores("variant", scores, [values[:1], values[1:]])


def test_quantiles_by_hand() -> None:
    five = of_tokens([5.0, 1.0, 4.0, 2.0, 3.0])
    assert five.kl_quantile(0.5) == 3.0
    assert five.kl_quantile(0.4) == 2.0
    assert five.kl_quantile(0.41) == 3.0
    assert five.kl_quantile(0.99) == five.kl_quantile(1.0) == 5.0
    assert five.kl_quantile(0.0) == 1.0
    hundred = of_tokens([float(i) for i in range(100, 0, -1)])
    assert (hundred.kl_quantile(0.5), hundred.kl_quantile(0.99)) == (50.0, 99.0)
    # Of an even number the lower one of the middle.
    assert of_tokens([4.0, 2.0]).kl_quantile(0.5) == 2.0
    assert of_tokens([7.0]).kl_quantile(0.99) == 7.0


def test_quantiles_of_tokens_that_were_not_kept() -> None:
    assert metrics([1.0, 2.0], kl=[1.0, 2.0]).kl_quantile(0.5) is None


@given(
    st.lists(st.floats(0.0, 50.0, width=32), min_size=1, max_size=40),
    # Sixteenths are exact.
    st.integers(0, 16),
)
def test_a_quantile_is_the_smallest_that_the_share_lies_within(
    kl: list[float], sixteenths: int
) -> None:
    found = of_tokens(kl).kl_quantile(sixteenths / 16)
    assert found in kl
    assert 16 * sum(one <= found for one in kl) >= sixteenths * len(kl)
    below = [one for one in kl if one < found]
    assert not below or 16 * len(below) < sixteenths * len(kl)


@pytest.mark.parametrize("length", [100, 300, 1100, 12_700, 327_600])
def test_one_token_in_a_hundred_lies_above_the_99th(length: int) -> None:
    values = torch.arange(length, dtype=torch.float32)
    whole = WindowMetrics.from_scores("variant", [(length, 0.0, 0.0, 0)], [values])
    assert whole.kl_quantile(0.99) == length * 99 // 100 - 1
