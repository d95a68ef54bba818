"""Rows of a results table: what quantization costs, and how many bits it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath
from kvq_evaluation.statistics import WindowMetrics, perplexity_increase

HEADERS = ("cache", "bits eff", "ppl", "Δ", "KL", "KL p99", "agree", "path")


@dataclass(frozen=True)
class EvaluationRow:
    """One variant on one text.

    Fields:
        name: the variant; ``unquantized`` for the first row.
        dataset: the text.
        perplexity, perplexity_stderr: over all scored tokens; the error over windows, None with a
            single window (so for every ``_stderr``).
        perplexity_increase, perplexity_increase_stderr: against the unquantized model on the same
            windows, paired.
        kl, kl_stderr: KL(unquantized || variant), nats a token.
        kl_median, kl_p99: what half and 99 % of the tokens stay below; None where tokens were not
            kept.
        agreement: share of tokens where both put the same token first.
        effective_bits: bits a cached number at the window's length, without the unfinished page.
        effective_bits_total: with it.
        windows, windows_available: evaluated, and in the text; fewer than all is a partial result.
        tokens: tokens scored.
        path: ``prefill`` is the evaluation rule: one forward pass over decoded keys and values.
            ``decode`` is the runtime rule: token by token through the packed cache, of a baseline
            in one forward that reads the same. The unquantized row is ``prefill`` always.
        attention_error: relative error of each layer's attention output on the first window, by
            layer; empty where it was not measured.
        seeds: of a row over several sidecars, which only their calibration seeds tell apart: these
            seeds. Its numbers are means over the sidecars; of its errors only that of KL is known.
        metrics: the sums of every window, to pair rows with; not compared, not shown.
    """

    name: str
    dataset: str
    perplexity: float
    perplexity_stderr: float | None
    perplexity_increase: float
    perplexity_increase_stderr: float | None
    kl: float
    kl_stderr: float | None
    kl_median: float | None
    kl_p99: float | None
    agreement: float
    effective_bits: float
    effective_bits_total: float
    windows: int
    windows_available: int
    tokens: int
    path: MeasuredPath = "prefill"
    attention_error: Mapping[int, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    metrics: WindowMetrics | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_metrics(
        cls,
        metrics: WindowMetrics,
        *,
        reference: WindowMetrics,
        dataset: str,
        effective_bits: float,
        effective_bits_total: float,
        windows_available: int | None = None,
        path: MeasuredPath = "prefill",
        attention_error: Mapping[int, float] | None = None,
    ) -> Self:
        """Summarize a variant's windows; ``reference`` is the unquantized model's."""
        increase = perplexity_increase(metrics, reference)
        windows = len(metrics.tokens)
        return cls(
            name=metrics.name,
            dataset=dataset,
            perplexity=metrics.perplexity.mean,
            perplexity_stderr=metrics.perplexity.stderr,
            perplexity_increase=increase.mean,
            perplexity_increase_stderr=increase.stderr,
            kl=metrics.mean_kl.mean,
            kl_stderr=metrics.mean_kl.stderr,
            kl_median=metrics.kl_quantile(0.5),
            kl_p99=metrics.kl_quantile(0.99),
            agreement=metrics.mean_agreement,
            effective_bits=effective_bits,
            effective_bits_total=effective_bits_total,
            windows=windows,
            windows_available=windows if windows_available is None else windows_available,
            tokens=int(metrics.tokens.sum()),
            path=path,
            attention_error=dict(attention_error or {}),
            metrics=metrics,
        )

    @property
    def partial(self) -> bool:
        """Whether the text had more windows than were evaluated."""
        return self.windows < self.windows_available

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, ``partial``, and the window sums under ``per_window``.

        ``seeds`` is there in a row over several seeds only, and ``per_window`` is not.
        """
        plain = {k: v for k, v in vars(self).items() if k not in ("metrics", "seeds")}
        if self.seeds:
            plain["seeds"] = list(self.seeds)
        plain["partial"] = self.partial
        if self.metrics is not None:
            plain["per_window"] = {
                "tokens": self.metrics.tokens.tolist(),
                "nll": self.metrics.nll.tolist(),
                "kl": self.metrics.kl.tolist(),
                "agreement": self.metrics.agreement.tolist(),
            }
        return plain


@dataclass(frozen=True)
class Table:
    """Text cells, for whoever draws them.

    Fields:
        headers: one a column.
        rows: as many cells each.
        caption: what was measured, in one line.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


def table(rows: Sequence[EvaluationRow]) -> Table:
    """Cells of rows on one text, with standard errors where they are known."""
    cells = []
    for row in rows:
        first = row.name == UNQUANTIZED
        cells.append(
            (
                row.name,
                f"{row.effective_bits:.2f}",
                with_error(row.perplexity, row.perplexity_stderr, digits=3),
                ""
                if first
                else with_error(row.perplexity_increase, row.perplexity_increase_stderr),
                "" if first else with_error(row.kl, row.kl_stderr, digits=5),
                "" if first or row.kl_p99 is None else f"{row.kl_p99:.4f}",
                f"{100 * row.agreement:.2f} %",
                row.path,
            )
        )
    return Table(headers=HEADERS, rows=tuple(cells), caption=caption(rows))


def caption(rows: Sequence[EvaluationRow]) -> str:
    """Texts, windows and tokens; ``partial: N windows`` where some were left out."""
    if not rows:
        return ""
    row = rows[0]
    extent = f"{row.windows} window" + ("" if row.windows == 1 else "s")
    if row.partial:
        extent = f"partial: {extent} of {row.windows_available}"
    return f"{row.dataset}: {extent}, {row.tokens:,} tokens scored"


def with_error(mean: float, stderr: float | None, *, digits: int = 3) -> str:
    """``mean ± stderr``, or the mean alone where the error is unknown."""
    if stderr is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"
