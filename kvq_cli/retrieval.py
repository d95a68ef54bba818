"""Retrieval from generated texts for ``kvq eval --retrieval``: what is asked, rows, a table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq_cli.measurement import DEFAULT_SEQ_LEN
from kvq_cli.output import Output, table
from kvq_formats.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_evaluation.baselines.named import Baseline
    from kvq_evaluation.perplexity import MeasuredPath
    from kvq_evaluation.retrieval import RetrievalExample, RetrievalRow
    from kvq_formats.sidecar import Sidecar

ALL = "all"
NUM_EXAMPLES = 50
HEADERS = ("task", "cache", "bits eff", "accuracy", "Δ", "nll", "path")


@dataclass(frozen=True)
class AskedRetrieval:
    """What ``--retrieval`` and its options ask for."""

    tasks: tuple[str, ...]
    tokens: int
    num_examples: int
    seed: int

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, positions: int | None
    ) -> list[RetrievalExample]:
        """Make the examples; raises what ``retrieval_examples`` raises."""
        from kvq_evaluation.retrieval import retrieval_examples

        return retrieval_examples(
            tokenizer,
            self.tasks,
            tokens=self.tokens,
            count=self.num_examples,
            seed=self.seed,
            positions=positions,
        )

    def to_json(self, rows: Sequence[RetrievalRow]) -> dict[str, Any]:
        """Plain values: what was asked, and the rows that it gave."""
        return {
            "tokens": self.tokens,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "rows": [row.to_json() for row in rows],
        }


def asked_retrieval(
    names: str | None,
    *,
    tokens: int | None,
    num_examples: int | None,
    seed: int | None,
    positions: int | None,
) -> AskedRetrieval | None:
    """Take ``--retrieval`` apart, commas between; None where it is not given.

    Without ``tokens``: 2,048, or the model's positions where they are fewer. Raises ConfigError for
    a name that is no task, and for options of retrieval without it.
    """
    from kvq_evaluation.retrieval import RETRIEVAL_TASKS

    if names is None:
        if any(given is not None for given in (tokens, num_examples, seed)):
            raise ConfigError(
                "--retrieval-tokens, --num-examples and --seed are about --retrieval.",
                hint="--retrieval all",
            )
        return None
    wanted = dict.fromkeys(part.strip() for part in names.split(",") if part.strip())
    if not wanted:
        raise ConfigError("--retrieval names no task.", hint="--retrieval all")
    for name in wanted:
        if name not in (*RETRIEVAL_TASKS, ALL):
            near = difflib.get_close_matches(name, [*RETRIEVAL_TASKS, ALL], n=1)
            raise ConfigError(
                f"--retrieval names {name!r}, expected {', '.join(RETRIEVAL_TASKS)} or {ALL}.",
                hint=f"Did you mean {near[0]}?" if near else f"--retrieval {ALL}",
            )
    chosen = RETRIEVAL_TASKS if ALL in wanted else wanted
    longest = min(DEFAULT_SEQ_LEN, positions or DEFAULT_SEQ_LEN)
    return AskedRetrieval(
        tasks=tuple(chosen),
        tokens=longest if tokens is None else tokens,
        num_examples=NUM_EXAMPLES if num_examples is None else num_examples,
        seed=seed or 0,
    )


def measure_retrieval(
    output: Output,
    model: PreTrainedModel,
    sidecars: Mapping[str, Sidecar],
    examples: Sequence[RetrievalExample],
    *,
    baselines: Mapping[str, Baseline] | None = None,
    path: Sequence[MeasuredPath] = ("prefill",),
) -> list[RetrievalRow]:
    """Answer the examples with every cache; say where decoding reads nothing that is quantized."""
    from kvq_evaluation.caches import decoding_reads_codes
    from kvq_evaluation.retrieval import retrieval_of_caches

    longest = max(example.tokens for example in examples)
    if "decode" in path:
        for name, sidecar in sidecars.items():
            if not decoding_reads_codes(sidecar.config, tokens=longest):
                output.warn(
                    f"{name}: decoding reads nothing from codes in retrieval texts of {longest} "
                    "tokens, because a query's own page is exact; more --retrieval-tokens measure "
                    "the cache"
                )
    with output.progress("retrieve") as progress:
        return retrieval_of_caches(
            model, examples, sidecars, baselines, path=path, progress=progress
        )


def retrieval_table(rows: Sequence[RetrievalRow]) -> Table:
    """Rows task by task, one a cache, with what was asked above."""
    cells = [
        (
            row.task,
            row.name,
            f"{row.effective_bits:.2f}",
            _with_error(row.accuracy, row.accuracy_stderr),
            "" if row.difference is None else _with_error(row.difference, row.difference_stderr),
            _with_error(row.nll, row.nll_stderr),
            row.path,
        )
        for row in rows
    ]
    counts = sorted({row.examples for row in rows})
    longest = max(row.tokens for row in rows)
    title = f"retrieval: {counts[0]} examples a task, at most {longest:,} tokens each"
    return table(HEADERS, cells, title=title, left=2)


def _with_error(mean: float, stderr: float | None) -> str:
    return f"{mean:.3f}" if stderr is None else f"{mean:.3f} ± {stderr:.3f}"
