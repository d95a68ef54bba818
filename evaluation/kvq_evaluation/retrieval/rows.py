"""Rows of a table of retrieval tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath
from kvq_evaluation.retrieval.examples import RetrievalExample
from kvq_evaluation.statistics import Estimate, ratio


@dataclass(frozen=True)
class ExampleScore:
    """One example with one cache: share of the answer's items that are right, and nll in nats."""

    accuracy: float
    nll: float


@dataclass(frozen=True)
class RetrievalRow:
    """One task with one cache.

    Fields:
        task: one of ``RETRIEVAL_TASKS``.
        name: the cache; ``unquantized`` in the first rows.
        accuracy: mean over examples of the share of the answer's items that are right.
        accuracy_stderr: over examples, None for a single one.
        nll, nll_stderr: of the answers' tokens after the right ones before them, nats a token.
        difference, difference_stderr: of accuracy from the unquantized model's, the error over
            paired examples; None in its own row.
        examples: how many were answered.
        tokens: of the longest, prompt and answer.
        path: how the cache was read.
    """

    task: str
    name: str
    accuracy: float
    accuracy_stderr: float | None
    nll: float
    nll_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    examples: int
    tokens: int
    path: MeasuredPath

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite as None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }


def retrieval_rows(
    examples: Sequence[RetrievalExample],
    scores: Mapping[str, Sequence[ExampleScore]],
    paths: Mapping[str, MeasuredPath],
) -> list[RetrievalRow]:
    """One row a cache and task, caches in the order of ``scores``, tasks in that of the examples.

    Args:
        examples: N of them.
        scores: by cache, the unquantized model's among them, N each.
        paths: by cache.
    """
    rows = []
    for name in scores:
        for task in dict.fromkeys(example.task for example in examples):
            chosen = [index for index, example in enumerate(examples) if example.task == task]
            accuracy = [scores[name][index].accuracy for index in chosen]
            reference = [scores[UNQUANTIZED][index].accuracy for index in chosen]
            of_answers = _mean(accuracy)
            nll = ratio(
                torch.tensor([scores[name][index].nll for index in chosen], dtype=torch.float64),
                torch.tensor([len(examples[index].answer_ids) for index in chosen]),
            )
            difference = (
                Estimate(math.nan, None)
                if name == UNQUANTIZED
                else _mean([a - b for a, b in zip(accuracy, reference, strict=True)])
            )
            rows.append(
                RetrievalRow(
                    task=task,
                    name=name,
                    accuracy=of_answers.mean,
                    accuracy_stderr=of_answers.stderr,
                    nll=nll.mean,
                    nll_stderr=nll.stderr,
                    difference=None if name == UNQUANTIZED else difference.mean,
                    difference_stderr=difference.stderr,
                    examples=len(chosen),
                    tokens=max(examples[index].tokens for index in chosen),
                    path=paths[name],
                )
            )
    return rows


def _mean(values: Sequence[float]) -> Estimate:
    return ratio(
        torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.int64)
    )
