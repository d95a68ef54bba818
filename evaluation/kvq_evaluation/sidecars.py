"""Measure sidecars, at hand or by path, and baselines, by name, on windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_evaluation.baselines.building import build_baselines, parse_baselines
from kvq_evaluation.caches import evaluate_caches
from kvq_evaluation.perplexity import MeasuredPath
from kvq_evaluation.report import EvaluationRow
from kvq_evaluation.seed_rows import with_seed_rows
from kvq_formats.errors import ConfigError, DataError
from kvq_formats.progress import Progress
from kvq_formats.sidecar import Sidecar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_on_tokens(
    model: PreTrainedModel,
    sidecars: Sequence[Sidecar | str | os.PathLike[str]] = (),
    *,
    tokens: Tensor,
    baselines: str | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: str = "tokens",
    path: MeasuredPath | Sequence[MeasuredPath] = "prefill",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[EvaluationRow]:
    """Measure what each sidecar and each baseline costs, against the unquantized model.

    Args:
        model: the causal language model that the sidecars were made for.
        sidecars: objects, folders or files; none is enough where there are baselines.
        tokens: windows of token ids, int64 ``[S, T]``.
        baselines: names of other methods, as ``kvq eval --baseline`` takes them: ``kivi2-g64``.
            They keep the sinks and recent tokens of the first sidecar, one sink without.
        tokenizer: the model's, for baselines that are calibrated: on the text of the first
            sidecar's calibration, on the built-in text without.
        dataset: a name for the text, for the rows.
        path: ``prefill``: one forward a window under the evaluation rule; ``decode``: what
            ``model.generate`` reads, sidecars token by token through the packed cache; or several.
        batch_size: windows a forward pass.
        progress: who hears how far it is.

    Returns the unquantized model's row, then for each path one a sidecar, named by its folder or by
    its place in the list, and one a baseline; behind sidecars that only their calibration seed
    tells apart one more over all of them (``seed_rows``). Raises ConfigError with nothing to
    measure, for an unknown path or baseline, and for a calibrated one without a tokenizer;
    DataError for tokens that are no ids, SidecarError, FingerprintMismatchError, and what
    ``evaluate_caches`` and ``build_baselines`` raise.
    """
    asked = parse_baselines(baselines)
    if not sidecars and not asked:
        raise ConfigError(
            "no sidecar and no baseline is given, expected at least one.",
            hint="kvq.evaluate(model, [sidecar], tokens=tokens); kvq.calibrate makes one",
        )
    _check_ids(tokens)
    loaded = [s if isinstance(s, Sidecar) else Sidecar.load(s) for s in sidecars]
    held = dict(zip(row_names(sidecars), loaded, strict=True))
    others = build_baselines(
        asked, model, tokenizer, held, seq_len=tokens.shape[1], progress=progress
    )
    rows = evaluate_caches(
        model,
        tokens,
        held,
        others,
        dataset=dataset,
        path=path,
        batch_size=batch_size,
        progress=progress,
    )
    return with_seed_rows(rows, held)


def _check_ids(tokens: Tensor) -> None:
    hint = "tokens=tokenizer(text, return_tensors='pt').input_ids"
    if not isinstance(tokens, Tensor):
        raise DataError(
            f"tokens is {type(tokens).__name__}, expected a tensor of int64 [S, T].", hint=hint
        )
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise DataError(
            f"tokens is {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}, expected "
            "int64 [S, T]: S windows of T token ids.",
            hint=hint,
        )


def row_names(sidecars: Sequence[Sidecar | str | os.PathLike[str]]) -> list[str]:
    """Name each sidecar by its folder, or as it was given where folders share a name.

    The same path twice, and objects that have no path, are told apart by their place in the list.
    """
    short = [_folder_name(sidecar, place) for place, sidecar in enumerate(sidecars, 1)]
    if len(set(short)) == len(short):
        return short
    full = [
        f"sidecar {place}" if isinstance(sidecar, Sidecar) else os.fspath(sidecar)
        for place, sidecar in enumerate(sidecars, 1)
    ]
    if len(set(full)) == len(full):
        return full
    return [f"{name} ({place})" for place, name in enumerate(full, 1)]


def _folder_name(sidecar: Sidecar | str | os.PathLike[str], place: int) -> str:
    if isinstance(sidecar, Sidecar):
        return f"sidecar {place}"
    path = Path(sidecar).expanduser()
    return (path.parent if path.is_file() else path).absolute().name
