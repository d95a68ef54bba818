"""Measuring sidecars on texts, as ``kvq eval`` and ``kvq demo`` do: rows, files, tables, bars."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvq_cli.output import Output, table
from kvq_formats.errors import ConfigError, GateMissedError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_calibration.data import TextSource, TokenWindows
    from kvq_evaluation.baselines.named import Baseline
    from kvq_evaluation.perplexity import MeasuredPath
    from kvq_evaluation.report import EvaluationRow
    from kvq_formats.sidecar import Sidecar

DEFAULT_SEQ_LEN = 2048
"""Tokens an evaluation window where the model has that many positions."""


@dataclass(frozen=True)
class MeasuredText:
    """One text: which part of it was taken, and the rows that it gave."""

    windows: TokenWindows
    rows: list[EvaluationRow]

    def to_json(self, *, per_window: bool) -> dict[str, Any]:
        """Plain values; ``per_window`` adds the sums of every window to each row."""
        rows = [row.to_json() for row in self.rows]
        if not per_window:
            rows = [{k: v for k, v in row.items() if k != "per_window"} for row in rows]
        used, total = self.rows[0].windows, self.rows[0].windows_available
        return {
            "dataset": self.windows.name,
            "revision": self.windows.revision,
            "token_sha256": self.windows.token_sha256,
            "partial": f"{used} of {total} windows" if used < total else None,
            "rows": rows,
        }


def cut_texts(
    output: Output,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[TextSource],
    *,
    seq_len: int,
    limit: int | None,
) -> list[TokenWindows]:
    """Cut every text into windows; what cutting has to say goes to the user."""
    from kvq_calibration.data import token_windows

    texts = []
    for source in sources:
        windows = token_windows(tokenizer, source, num_windows=limit, seq_len=seq_len)
        for line in windows.notes:
            output.note(line)
        if len(windows.input_ids) == 1:
            output.note(f"{windows.name} gives one window: no standard error")
        texts.append(windows)
    return texts


def measure(
    output: Output,
    model: PreTrainedModel,
    sidecars: Mapping[str, Sidecar],
    texts: Sequence[TokenWindows],
    *,
    baselines: Mapping[str, Baseline] | None = None,
    path: MeasuredPath | Sequence[MeasuredPath] = "prefill",
    batch_size: int,
) -> list[MeasuredText]:
    """Measure every cache on every text, and add rows over calibration seeds.

    Says where a path reads nothing that is quantized.
    """
    from kvq_cli.progress import Titled
    from kvq_evaluation.caches import decoding_reads_codes, evaluate_caches
    from kvq_evaluation.seed_rows import with_seed_rows

    if texts and "decode" in ((path,) if isinstance(path, str) else path):
        longest = max(windows.input_ids.shape[1] for windows in texts)
        for name, sidecar in sidecars.items():
            if not decoding_reads_codes(sidecar.config, tokens=longest):
                output.warn(
                    f"{name}: decoding reads nothing from codes in windows of {longest} tokens, "
                    "because a query's own page is exact; a longer --seq-len measures the cache"
                )
    measured = []
    with output.progress(*(windows.name for windows in texts)) as progress:
        for windows in texts:
            rows = evaluate_caches(
                model,
                windows.input_ids,
                sidecars,
                baselines,
                dataset=windows.name,
                windows_available=windows.windows_total,
                path=path,
                batch_size=batch_size,
                progress=Titled(progress, f"on {windows.name}"),
            )
            measured.append(MeasuredText(windows, with_seed_rows(rows, sidecars)))
    return measured


def tables(measured: Sequence[MeasuredText]) -> list[Table]:
    """One table a text, with what was measured above it."""
    from kvq_evaluation.report import table as report_table

    drawn = []
    for text in measured:
        cells = report_table(text.rows)
        drawn.append(table(cells.headers, cells.rows, title=cells.caption))
    return drawn


@dataclass(frozen=True)
class Gate:
    """A bar that the user set, against what a sidecar reached on a text.

    Fields:
        name, dataset: the sidecar and the text.
        path: how the text was read, ``prefill`` or ``decode``.
        metric: ``perplexity_increase``, or ``kl`` in nats a token.
        limit: the most that is allowed.
        found: what was measured.
    """

    name: str
    dataset: str
    path: MeasuredPath
    metric: str
    limit: float
    found: float

    @property
    def passed(self) -> bool:
        """Whether the measured number is at most the bar."""
        return self.found <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "passed": self.passed}


def check_limits(*, max_ppl_increase: float | None, max_kl: float | None) -> None:
    """Refuse bars that nothing can be compared with; raises ConfigError."""
    for flag, limit in {"--max-ppl-increase": max_ppl_increase, "--max-kl": max_kl}.items():
        if limit is not None and not (math.isfinite(limit) and limit >= 0):
            raise ConfigError(
                f"{flag} is {limit:g}, expected a number of at least 0.",
                hint=f"{flag} 0.1, or leave it out for no bar",
            )


def check_gated(
    sidecars: Collection[str],
    texts: Collection[str],
    *,
    max_ppl_increase: float | None,
    max_kl: float | None,
) -> None:
    """Refuse bars where there is no sidecar, or no text, to hold to them; raises ConfigError."""
    limits = {"--max-ppl-increase": max_ppl_increase, "--max-kl": max_kl}
    flags = " and ".join(flag for flag, limit in limits.items() if limit is not None)
    if flags and not sidecars:
        raise ConfigError(
            f"{flags}: there is no sidecar to hold to it, expected at least one; baselines only "
            "inform.",
            hint="--sidecar DIR",
        )
    if flags and not texts:
        raise ConfigError(
            f"{flags}: there is no text to measure it on, expected at least one; tasks and "
            "retrieval have no bars.",
            hint="--ppl wikitext2",
        )


def check_gates(
    measured: Sequence[MeasuredText],
    sidecars: Collection[str],
    *,
    max_ppl_increase: float | None,
    max_kl: float | None,
) -> list[Gate]:
    """Compare every row of a sidecar with the bars that are set.

    Baselines, and rows over several seeds, only inform.
    """
    limits = {"perplexity_increase": max_ppl_increase, "kl": max_kl}
    return [
        Gate(row.name, row.dataset, row.path, metric, limit, getattr(row, metric))
        for text in measured
        for row in text.rows
        if row.name in sidecars and not row.seeds
        for metric, limit in limits.items()
        if limit is not None
    ]


def raise_missed(gates: Sequence[Gate]) -> None:
    """Raise GateMissedError that names every bar that was missed, if any was."""
    missed = [gate for gate in gates if not gate.passed]
    if missed:
        raise GateMissedError(
            "\n".join(
                f"{gate.name} on {gate.dataset}, {gate.path}: {gate.metric} is "
                f"{gate.found:.5g}, allowed {gate.limit:g}"
                for gate in missed
            ),
            hint="more --bits or a larger --outlier-fraction: kvq calibrate --help",
        )


def window_length(positions: int | None, asked: int | None, output: Output) -> int:
    """Tokens a window: 2,048 or what was asked for, at most the model's positions, with a note."""
    wanted = DEFAULT_SEQ_LEN if asked is None else asked
    if positions is None or wanted <= positions:
        return wanted
    if asked is not None:
        output.note(f"--seq-len {asked} is clamped to the model's {positions} positions")
    return positions
