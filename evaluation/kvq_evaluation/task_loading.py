"""Tasks of lm_eval, found by name and loaded with their data, before any model is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq_evaluation.lm_eval_quiet import quiet_lm_eval, tasks_seeded
from kvq_formats.errors import ConfigError, DataError, KVQError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SEED = 1234
"""lm_eval's own default for the examples in prompts."""

INSTALL = 'pip install "kvq[eval]"'


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks whose data are at hand, as lm_eval keeps them.

    Fields:
        tasks, groups, group_map: by name, as ``TaskManager.load`` returns them.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    group_map: dict[str, list[str]]


def load_tasks(
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    seed: int = SEED,
) -> LoadedTasks:
    """Find tasks and load their data, which may take a download.

    Args:
        names: tasks, groups or tags of lm_eval; ``*`` stands for any letters.
        num_fewshot: examples in a prompt, except for tasks that insist on none; None leaves it to
            the tasks.
        include_path: a folder of tasks of one's own, found before lm_eval's.
        seed: for tasks that draw their documents.

    Raises KVQError where lm_eval or a package that a task needs is missing, ConfigError for tasks
    that run code or read images, DataError for unknown tasks and for data that cannot be had.
    """
    check_installed()
    if not names:
        raise ConfigError("no task is named.", hint="--tasks arc_easy,hellaswag")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(
            f"there is no folder {include_path}.", hint="--tasks-path names a folder of YAML files"
        )
    found = LoadedTasks({}, {}, {})
    with quiet_lm_eval(), tasks_seeded(seed):
        manager, known = _find(names, include_path)
        for name in known:
            loaded = _load(manager, name)
            found.tasks.update(loaded["tasks"])
            found.groups.update(loaded.get("groups", {}))
            found.group_map.update(loaded.get("group_map", {}))
        for name, task in found.tasks.items():
            _check_kind(name, task)
            own = task.get_config("num_fewshot")
            # As lm_eval does: 0 in a task's own file is meant.
            if num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
    return found


def check_installed() -> None:
    """Raise KVQError where lm_eval is missing."""
    if find_spec("lm_eval") is None:
        raise KVQError("tasks need lm_eval, which is not installed.", hint=INSTALL)


def _find(
    names: Sequence[str], include_path: str | os.PathLike[str] | None
) -> tuple[TaskManager, list[str]]:
    """An index of tasks that has all that is asked for, and the names without ``*``."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        # Then lm_eval's own index, many thousand files, need not be read.
        if set(names) <= set(own.all_subtasks):
            return own, list(names)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise DataError(
                f"lm_eval has no task {name}.",
                hint=f"did you mean {', '.join(near)}?" if near else "list them: lm-eval ls tasks",
            )
        known += matches
    return manager, list(dict.fromkeys(known))


def _load(manager: TaskManager, name: str) -> Mapping[str, Any]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        loaded: Mapping[str, Any] = manager.load([name])
    except ImportError as error:
        raise KVQError(
            f"the task {name} needs a package that is not installed: {_first_line(error)}",
            hint='lm_eval has extras for such tasks, as in: pip install "lm_eval[math,ifeval]"',
        ) from error
    except (OSError, ValueError, RuntimeError, HTTPError, DatasetsError) as error:
        raise DataError(
            f"the data of the task {name} cannot be had: {type(error).__name__}: "
            f"{_first_line(error)}",
            hint="most come from the Hugging Face Hub, and stay in its cache after the first time",
        ) from error
    return loaded


def _check_kind(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"the task {name} runs code that the model writes; kvq does not.",
            hint="run it with lm_eval itself, in a sandbox",
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"the task {name} has images or sound; kvq reads text only.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
