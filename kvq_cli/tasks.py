"""Tasks of lm_eval, as ``kvq eval --tasks`` runs them: what is asked for, notes, rows, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_cli.output import Output, table
from kvq_formats.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_evaluation.task_loading import LoadedTasks
    from kvq_evaluation.task_rows import TaskRow
    from kvq_formats.sidecar import Sidecar

HEADERS = ("task", "metric", "cache", "value", "Δ", "n", "path")


def find_tasks(
    output: Output, names: str, *, num_fewshot: int | None = None, tasks_path: Path | None = None
) -> LoadedTasks:
    """Find the tasks of ``--tasks``, commas between, and load their data; before any weights.

    Raises ConfigError where nothing is named, and what ``load_tasks`` raises.
    """
    from kvq_evaluation.task_loading import load_tasks

    wanted = [part.strip() for part in names.split(",") if part.strip()]
    if not wanted:
        raise ConfigError("--tasks names no task.", hint="--tasks arc_easy,hellaswag")
    with output.progress("load tasks") as progress, progress.stage("load tasks", 1) as done:
        loaded = load_tasks(wanted, num_fewshot=num_fewshot, include_path=tasks_path)
        done()
    if num_fewshot:
        kept = sorted(
            name for name, task in loaded.tasks.items() if task.get_config("num_fewshot") == 0
        )
        if kept:
            output.note(f"--num-fewshot does not apply to {_some(kept)}: made for no examples")
    return loaded


def measure_tasks(
    output: Output,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sidecars: Mapping[str, Sidecar],
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 1,
) -> list[TaskRow]:
    """Run the tasks with every sidecar; say what was cut, and where nothing was read from codes.

    Raises what ``run_tasks`` raises.
    """
    from kvq_evaluation.tasks import run_tasks

    with output.progress("run tasks") as progress:
        rows = run_tasks(
            model,
            tokenizer,
            sidecars,
            tasks,
            limit=limit,
            batch_size=batch_size,
            progress=progress,
        )
    _say_what_was_cut(output, rows)
    _say_what_was_not_read(output, rows, sidecars)
    return rows


def tasks_table(rows: Sequence[TaskRow]) -> Table:
    """Rows task by task, one a cache; of a group that is summed up, the sum alone."""
    shown = [row for row in rows if not row.of_group]
    order = list(dict.fromkeys((row.task, row.metric) for row in shown))
    cells = [
        (
            row.task,
            row.metric,
            row.name,
            _with_error(row.value, row.stderr),
            "" if row.difference is None else _with_error(row.difference, row.difference_stderr),
            f"{row.samples} of {row.samples_available}" if row.partial else str(row.samples),
            row.path,
        )
        for row in sorted(shown, key=lambda row: order.index((row.task, row.metric)))
    ]
    partial = "partial: not all samples of each task" if any(r.partial for r in shown) else None
    return table(HEADERS, cells, title=partial, left=3)


def _with_error(mean: float, stderr: float | None) -> str:
    if stderr is None or not math.isfinite(stderr):
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {stderr:.4f}"


def _say_what_was_cut(output: Output, rows: Sequence[TaskRow]) -> None:
    cut = {row.task: row.truncated for row in rows if row.truncated and not row.of_group}
    for task, count in cut.items():
        output.warn(
            f"{task}: {count} requests are longer than the model reads; they lost their beginning"
        )


def _say_what_was_not_read(
    output: Output, rows: Sequence[TaskRow], sidecars: Mapping[str, Sidecar]
) -> None:
    """Warn of texts so short that generation found no page behind it."""
    from kvq_evaluation.caches import decoding_reads_codes

    for name, sidecar in sidecars.items():
        exact = {
            row.task: row.longest
            for row in rows
            if row.name == name
            and row.path == "decode"
            and not decoding_reads_codes(sidecar.config, tokens=row.longest)
        }
        if exact:
            output.warn(
                f"{name}: {_some(list(exact))} read nothing from codes: the longest text has "
                f"{max(exact.values())} tokens, and a query's own page is exact; more examples in "
                "a prompt measure the cache"
            )


def _some(names: Sequence[str]) -> str:
    """Names with commas between, the first few of many."""
    most = 5
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
