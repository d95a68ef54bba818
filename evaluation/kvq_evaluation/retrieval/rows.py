"""Rows of a table of retrieval tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath
from kvq_evaluation.retrieval.examples import RetrievalExample
from kvq_evaluation.retrieval.scoring import ExampleScore
from kvq_evaluation.statistics import Estimate, ratio


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
        effective_bits: bits a cached number at the longest example's length, without the
            unfinished page.
        examples: how many were answered.
        tokens: of the longest, prompt and answer.
        path: ``prefill`` is the evaluation rule, ``decode`` the runtime rule, the answer token by
            token. The unquantized row is ``prefill`` always.
    """

    task: str
    name: str
    accuracy: float
    accuracy_stderr: float | None
    nll: float
    nll_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    effective_bits: float
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
    rows: Mapping[str, tuple[str, MeasuredPath]],
    bits: Mapping[str, float],
) -> list[RetrievalRow]:
    """One row a task and cache: tasks in the order of the examples, in each the caches.

    Args:
        examples: N of them.
        scores: by variant, the unquantized model among them, N each.
        rows: by variant, the name and the path of its rows.
        bits: effective bits, by that name.
    """
    tasks: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        tasks.setdefault(example.task, []).append(index)
    made = []
    for task, chosen in tasks.items():
        reference = [scores[UNQUANTIZED][index].accuracy for index in chosen]
        for variant, all_scores in scores.items():
            name, path = rows[variant]
            own = [all_scores[index] for index in chosen]
            accuracy = _mean([score.accuracy for score in own])
            nll = ratio(
                torch.tensor([score.nll for score in own], dtype=torch.float64),
                torch.tensor([len(examples[index].answer_ids) for index in chosen]),
            )
            paired = zip(own, reference, strict=True)
            difference = (
                None
                if variant == UNQUANTIZED
                else _mean([score.accuracy - other for score, other in paired])
            )
            made.append(
                RetrievalRow(
                    task=task,
                    name=name,
                    accuracy=accuracy.mean,
                    accuracy_stderr=accuracy.stderr,
                    nll=nll.mean,
                    nll_stderr=nll.stderr,
                    difference=None if difference is None else difference.mean,
                    difference_stderr=None if difference is None else difference.stderr,
                    effective_bits=bits[name],
                    examples=len(chosen),
                    tokens=max(examples[index].tokens for index in chosen),
                    path=path,
                )
            )
    return made


def _mean(values: Sequence[float]) -> Estimate:
    return ratio(
        torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.int64)
    )
