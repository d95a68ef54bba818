"""Means over windows, their standard errors, and what counts as a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

COUNTS_BEYOND = 2.0
"""A difference counts beyond this many paired standard errors."""


@dataclass(frozen=True)
class WindowMetrics:
    """Sums of one variant, one entry a window, on the CPU.

    Fields:
        name: the variant.
        tokens: int64 ``[S]``, tokens scored.
        nll, kl: f64 ``[S]``, sums over the window's tokens, nats.
        agreement: int64 ``[S]``, tokens where the variant puts the same token first.
        token_kl: f32 ``[sum of tokens]``, KL of every scored token, nats; empty where it was not
            kept.
    """

    name: str
    tokens: Tensor
    nll: Tensor
    kl: Tensor
    agreement: Tensor
    token_kl: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def from_scores(
        cls,
        name: str,
        scores: Sequence[tuple[int, float, float, int]],
        token_kl: Sequence[Tensor] = (),
    ) -> Self:
        """Gather ``(tokens, nll, kl, agreement)`` of every window, and KL token by token."""
        tokens, nll, kl, agreement = zip(*scores, strict=True)
        return cls(
            name=name,
            tokens=torch.tensor(tokens, dtype=torch.int64),
            nll=torch.tensor(nll, dtype=torch.float64),
            kl=torch.tensor(kl, dtype=torch.float64),
            agreement=torch.tensor(agreement, dtype=torch.int64),
            token_kl=torch.cat(list(token_kl)).float().cpu() if token_kl else torch.empty(0),
        )

    @property
    def perplexity(self) -> Estimate:
        """``exp`` of the mean nll over all scored tokens; standard error by the delta method."""
        nll = ratio(self.nll, self.tokens)
        mean = float(torch.tensor(nll.mean, dtype=torch.float64).exp())
        return Estimate(mean, None if nll.stderr is None else mean * nll.stderr)

    @property
    def mean_kl(self) -> Estimate:
        """Mean KL(unquantized || variant), nats a token."""
        return ratio(self.kl, self.tokens)

    def kl_quantile(self, share: float) -> float | None:
        """The KL that ``share`` of the tokens stay below; None where tokens were not kept.

        The nearest of the measured ones, not interpolated.
        """
        if len(self.token_kl) == 0:
            return None
        place = max(1, math.ceil(share * len(self.token_kl)))
        return float(self.token_kl.kthvalue(place).values)

    @property
    def mean_agreement(self) -> float:
        """Share of tokens where both models put the same token first."""
        return int(self.agreement.sum()) / int(self.tokens.sum())


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which is None where one window leaves it unknown."""

    mean: float
    stderr: float | None

    @property
    def counts(self) -> bool | None:
        """Whether it lies beyond two standard errors from 0; None where the error is unknown."""
        if self.stderr is None:
            return None
        return abs(self.mean) > COUNTS_BEYOND * self.stderr


def ratio(sums: Tensor, tokens: Tensor) -> Estimate:
    """Mean a token of f64 ``[S]`` window sums with int64 ``[S]`` token counts.

    The standard error is the delta method's for a ratio of sums over S windows; with windows of one
    length it is the standard error of the mean of the window means. Windows are taken as
    independent draws, which neighbours of one document are only roughly.
    """
    total = tokens.sum().double()
    mean = sums.double().sum() / total
    windows = len(sums)
    if windows < 2:
        return Estimate(float(mean), None)
    residuals = sums.double() - mean * tokens
    variance = residuals.square().sum() * windows / (windows - 1) / total.square()
    return Estimate(float(mean), float(variance.sqrt()))


def paired_difference(
    a: WindowMetrics,
    b: WindowMetrics,
    *,
    metric: Literal["kl", "nll"] = "kl",
    factor: float = 1.0,
) -> Estimate:
    """Mean of ``a - factor * b``, nats a token, with the standard error over paired windows.

    Both were measured on the same windows, so what a hard window adds to both cancels. With
    ``factor=0.5`` a mean below 0 says that a is less than half of b.
    """
    _check_paired(a, b)
    return ratio(getattr(a, metric) - factor * getattr(b, metric), a.tokens)


def over_seeds(runs: Sequence[WindowMetrics]) -> Estimate:
    """Mean KL over calibration seeds, nats a token, measured on the same windows.

    The standard error joins both sources: windows, of each window's mean over the seeds, and seeds,
    of the means over windows. A single seed has no second part.
    """
    for run in runs[1:]:
        _check_paired(run, runs[0])
    joined = ratio(torch.stack([run.kl for run in runs]).mean(0), runs[0].tokens)
    if joined.stderr is None or len(runs) < 2:
        return joined
    means = torch.tensor([run.mean_kl.mean for run in runs], dtype=torch.float64)
    return Estimate(joined.mean, math.hypot(joined.stderr, float(means.std()) / len(runs) ** 0.5))


def perplexity_increase(a: WindowMetrics, reference: WindowMetrics) -> Estimate:
    """Perplexity of a minus that of the reference; delta method over paired windows."""
    _check_paired(a, reference)
    high, low = a.perplexity.mean, reference.perplexity.mean
    # d exp(mean) = exp(mean) * d mean, for both, on the same windows.
    gradient = ratio(high * a.nll - low * reference.nll, a.tokens)
    return Estimate(high - low, gradient.stderr)


def _check_paired(a: WindowMetrics, b: WindowMetrics) -> None:
    if not torch.equal(a.tokens, b.tokens):
        raise ValueError(f"{a.name} and {b.name} were not measured on the same windows")
