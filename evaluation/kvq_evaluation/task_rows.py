"""Rows of a table of tasks: lm_eval's results, and what each differs from the unquantized model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.task_loading import LoadedTasks

TaskPath = Literal["prefill", "decode", "mixed"]
"""How a task reads the cache: in one forward, as text is generated, or some requests each way."""


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task with one cache.

    Fields:
        task: its name in lm_eval, or that of a group.
        metric: with the filter behind a comma where it is not "none": ``exact_match,strict-match``.
        value: as lm_eval aggregates it; stderr: over samples, None where lm_eval knows none.
        samples, samples_available: documents evaluated, and in the task.
        path: ``prefill``: likelihoods, under the evaluation rule. ``decode``: generated text, under
            the runtime rule, where a query reads its own page exactly.
        name: the cache; ``unquantized`` in the first rows.
        difference, difference_stderr: against the unquantized model; the error over paired samples,
            None for what is no mean over samples.
        num_fewshot: examples in a prompt; None for a group whose tasks differ.
        longest: tokens of the longest text, prompt and continuation.
        truncated: requests that were cut at the left to fit the model.
        of_group: whether a row of its group sums it up.
        each: the metric of every sample, to pair rows with; not compared, not shown.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    path: TaskPath
    name: str
    samples_available: int
    difference: float | None = None
    difference_stderr: float | None = None
    num_fewshot: int | None = None
    longest: int = 0
    truncated: int = 0
    of_group: bool = False
    each: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def partial(self) -> bool:
        """Whether the task has more samples than were evaluated."""
        return self.samples < self.samples_available

    def to_json(self) -> dict[str, Any]:
        """Plain values and ``partial``; numbers that are not finite as None."""
        plain = {name: value for name, value in vars(self).items() if name != "each"}
        for name, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                plain[name] = None
        return {**plain, "partial": self.partial}


def task_rows(
    results: Mapping[str, Any],
    tasks: LoadedTasks,
    *,
    name: str,
    longest: Mapping[str, int],
    truncated: Mapping[str, int],
) -> list[TaskRow]:
    """One cache's rows, tasks and groups in lm_eval's order.

    Args:
        results: what ``lm_eval.evaluate`` returned, its samples among it.
        tasks: those that were evaluated.
        name: the cache.
        longest, truncated: by task, as ``KVQLM`` counted them.
    """
    children = results["group_subtasks"]
    inner = {child for group in results.get("groups", {}) for child in children[group]}
    rows = []
    for task, metrics in results["results"].items():
        leaves = _leaves(task, children)
        counts = [results["n-samples"][leaf] for leaf in leaves]
        fewshot = {tasks.tasks[leaf].get_config("num_fewshot") for leaf in leaves}
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            row = TaskRow(
                task=task,
                metric=metric if chosen == "none" else key,
                value=float(value),
                # lm_eval says "N/A" where it knows none.
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                samples=sum(count["effective"] for count in counts),
                path=_path(tasks.tasks[leaf] for leaf in leaves),
                name=name,
                samples_available=sum(count["original"] for count in counts),
                num_fewshot=next(iter(fewshot)) if len(fewshot) == 1 else None,
                longest=max(longest.get(leaf, 0) for leaf in leaves),
                truncated=sum(truncated.get(leaf, 0) for leaf in leaves),
                of_group=task in inner,
                each=_each(results["samples"].get(task, []), metric, chosen, value),
            )
            rows.append(row)
    return rows


def with_differences(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows, each of a cache with its difference from the unquantized model's."""
    references = {(row.task, row.metric): row for row in rows if row.name == UNQUANTIZED}
    compared = []
    for row in rows:
        reference = references.get((row.task, row.metric))
        if row.name != UNQUANTIZED and reference is not None:
            row = replace(
                row,
                difference=row.value - reference.value,
                difference_stderr=_paired_error(row.each, reference.each),
            )
        compared.append(row)
    return compared


def _paired_error(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Standard error of the mean of ``a - b``; None where samples do not pair or are too few."""
    if len(a) != len(b) or len(a) < 2:
        return None
    return statistics.stdev(x - y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of its groups; a task itself."""
    if name not in children:
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


def _path(tasks: Iterable[Any]) -> TaskPath:
    generated = {
        request.request_type == "generate_until" for task in tasks for request in task.instances
    }
    if len(generated) > 1:
        return "mixed"
    return "decode" if generated == {True} else "prefill"


def _each(
    logged: Sequence[Mapping[str, Any]], metric: str, chosen: str, value: float
) -> tuple[float, ...]:
    """The metric of every sample, where ``value`` is their mean; else nothing."""
    found = [sample.get(metric) for sample in logged if sample["filter"] == chosen]
    numbers = [float(one) for one in found if isinstance(one, int | float)]
    if not numbers or len(numbers) < len(found):
        return ()
    is_mean = math.isclose(statistics.fmean(numbers), value, rel_tol=1e-9, abs_tol=1e-12)
    return tuple(numbers) if is_mean else ()
