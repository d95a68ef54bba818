"""Rows of a results table: what quantization costs, and how many bits it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor

from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath, Variant, evaluate
from kvq_evaluation.statistics import WindowMetrics, perplexity_increase
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.effective_bits import effective_bits
from kvq_formats.progress import Progress
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADERS = ("cache", "bits eff", "ppl", "Δ", "KL", "agree", "path")


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
        agreement: share of tokens where both put the same token first.
        effective_bits: bits a cached number at the window's length, without the unfinished page.
        effective_bits_total: with it.
        windows, windows_available: evaluated, and in the text; fewer than all is a partial result.
        tokens: tokens scored.
        path: ``prefill`` is the evaluation rule: one forward pass over decoded keys and values.
            ``decode`` is the runtime rule: token by token through the packed cache. The
            unquantized row is ``prefill`` always.
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
    agreement: float
    effective_bits: float
    effective_bits_total: float
    windows: int
    windows_available: int
    tokens: int
    path: MeasuredPath = "prefill"
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
            agreement=metrics.mean_agreement,
            effective_bits=effective_bits,
            effective_bits_total=effective_bits_total,
            windows=windows,
            windows_available=windows if windows_available is None else windows_available,
            tokens=int(metrics.tokens.sum()),
            path=path,
            metrics=metrics,
        )

    @property
    def partial(self) -> bool:
        """Whether the text had more windows than were evaluated."""
        return self.windows < self.windows_available

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, ``partial``, and the window sums under ``per_window``."""
        plain = {name: value for name, value in vars(self).items() if name != "metrics"}
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


def evaluate_sidecars(
    model: PreTrainedModel,
    windows: Tensor | Sequence[Tensor],
    sidecars: Mapping[str, Sidecar],
    *,
    dataset: str,
    windows_available: int | None = None,
    path: MeasuredPath = "prefill",
    batch_size: int = 1,
    scored: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[EvaluationRow]:
    """Measure sidecars against the unquantized model.

    Args:
        model, windows, batch_size, scored, progress: as for ``perplexity.evaluate``.
        sidecars: by the name that their row gets.
        dataset: what the windows were cut from.
        windows_available: windows in the text, if not all are given.
        path: ``prefill``, the evaluation rule in one forward a window; ``decode``, the runtime rule
            token by token through the packed cache, where a query reads its own page exactly.

    Returns the unquantized model's row, then one a sidecar. Raises what ``evaluate`` raises, and
    FingerprintMismatchError for a sidecar of another model.
    """
    rule: Literal["evaluation", "runtime"] = "runtime" if path == "decode" else "evaluation"
    variants: dict[str, Variant] = {
        name: partial(attach, model, sidecar, rule=rule) for name, sidecar in sidecars.items()
    }
    measured = evaluate(
        model,
        windows,
        variants=variants,
        path=path,
        batch_size=batch_size,
        scored=scored,
        progress=progress,
    )
    tokens = max(len(window) for window in windows)
    dtype_bits = float(8 * model.get_input_embeddings().weight.element_size())
    bits = {UNQUANTIZED: (dtype_bits, dtype_bits)}
    bits |= {name: sidecar_bits(sidecar, tokens=tokens) for name, sidecar in sidecars.items()}
    return [
        EvaluationRow.from_metrics(
            metrics,
            reference=measured[0],
            dataset=dataset,
            effective_bits=bits[metrics.name][0],
            effective_bits_total=bits[metrics.name][1],
            windows_available=windows_available,
            path="prefill" if metrics.name == UNQUANTIZED else path,
        )
        for metrics in measured
    ]


def decoding_reads_codes(config: KVQConfig, *, tokens: int) -> bool:
    """Whether decoding a window of ``tokens`` tokens reads any page from its codes.

    The last query is that of the token before the last, which is only a label; its own page and the
    recent tokens are exact.
    """
    last_query = tokens - 2
    first_page_end = config.sink_tokens + PAGE_TOKENS - 1
    return first_page_end < last_query - config.recent_tokens


def sidecar_bits(sidecar: Sidecar, *, tokens: int) -> tuple[float, float]:
    """Effective bits of a text of ``tokens`` tokens, without and with its unfinished page."""
    fingerprint = sidecar.base_model.fingerprint
    counted = effective_bits(
        sidecar.config,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        tokens=tokens,
    )
    return counted.without_unfinished, counted.total
