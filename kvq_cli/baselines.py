"""Baselines for ``kvq eval --baseline``: where they are used, and built with notes to the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvq_cli.output import Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_evaluation.baselines.named import Baseline, BaselineName
    from kvq_formats.sidecar import Sidecar


def used_baselines(
    output: Output, asked: list[BaselineName], *, measured: bool, tasks: bool
) -> list[BaselineName]:
    """Those that something is measured with: none on tasks alone, which is said.

    ``measured``: a text or retrieval is asked for; ``tasks``: tasks are.
    """
    if not asked or not tasks:
        return asked
    names = ", ".join(one.name for one in asked)
    where = "are not run on tasks" if measured else "are left out: tasks are run without them"
    output.note(f"baselines ({names}) {where}")
    return asked if measured else []


def make_baselines(
    output: Output,
    asked: Sequence[BaselineName],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sidecars: Mapping[str, Sidecar],
    *,
    seq_len: int,
) -> dict[str, Baseline]:
    """Build each baseline; raises what ``build_baselines`` raises."""
    from kvq_evaluation.baselines.building import build_baselines

    with output.progress("samples") as progress:
        return build_baselines(
            asked,
            model,
            tokenizer,
            sidecars,
            seq_len=seq_len,
            on_note=output.warn,
            progress=progress,
        )
