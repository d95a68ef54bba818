"""Perplexity and divergence of many variants of one model in one pass over the same windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_evaluation.divergence import token_metrics
from kvq_evaluation.statistics import WindowMetrics
from kvq_formats.errors import CalibrationError, ConfigError, DataError
from kvq_formats.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Variant = Callable[[], AbstractContextManager[object]]
"""Makes a context manager inside which the model runs with a quantized cache."""

UNQUANTIZED = "unquantized"


def evaluate(
    model: PreTrainedModel,
    windows: Tensor | Sequence[Tensor],
    *,
    variants: Mapping[str, Variant],
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[WindowMetrics]:
    """Score every window under the unquantized model and under each variant.

    Args:
        model: a causal language model; runs in evaluation mode, without gradients and cache.
        windows: int64 ``[S, T]``, or a sequence of int64 ``[T_i]``: consecutive pieces of a text
            that do not overlap. A window of T tokens scores T - 1. Batches hold windows of one
            length, so nothing is padded.
        variants: by name; each is entered once a batch.
        batch_size: windows a forward pass.
        progress: told of ``(1 + len(variants)) * batches`` steps.

    Returns the unquantized model's metrics first, then one for each variant in the order given. For
    each batch the unquantized model runs once and its logits are dropped before the next batch: two
    ``[batch_size, T, V]`` tensors live at a time, in the model's dtype.

    Raises DataError where there is nothing to score, ConfigError for a batch size below 1 or a
    variant named as the unquantized model, CalibrationError for logits that are not finite (naming
    the variant).
    """
    rows = [window.reshape(-1) for window in windows]
    _check(rows, variants, batch_size)
    names = [UNQUANTIZED, *variants]
    contexts: list[Variant] = [nullcontext, *variants.values()]
    scores: dict[str, list[tuple[int, float, float, int]]] = {name: [] for name in names}
    batches = _batches(rows, batch_size)
    device = model.get_input_embeddings().weight.device
    listener = progress or SilentProgress()
    with (
        torch.no_grad(),
        _evaluation_mode(model),
        listener.stage("evaluate", len(batches) * len(names)) as done,
    ):
        for batch in batches:
            input_ids = torch.stack(batch).to(device)
            reference: Tensor | None = None
            for name, context in zip(names, contexts, strict=True):
                with context():
                    logits = model(input_ids=input_ids, use_cache=False).logits
                if reference is None:
                    reference = logits
                for row, ids in enumerate(input_ids):
                    metrics = token_metrics(reference[row, :-1], logits[row, :-1], ids[1:])
                    nll, kl = float(metrics.nll.sum()), float(metrics.kl.sum())
                    agreement = int(metrics.agrees.sum())
                    _check_finite(name, len(scores[name]), nll + kl)
                    scores[name].append((len(ids) - 1, nll, kl, agreement))
                del logits
                done()
    return [WindowMetrics.from_scores(name, scores[name]) for name in names]


def _check(rows: list[Tensor], variants: Mapping[str, Variant], batch_size: int) -> None:
    if not rows:
        raise DataError(
            "there is no window to evaluate, expected at least one.",
            hint="give a longer text or a shorter --seq-len",
        )
    shortest = min(len(row) for row in rows)
    if shortest < 2:
        raise DataError(
            f"a window has {shortest} token(s), expected at least 2: the first is only context.",
            hint="give a longer text",
        )
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}, expected 1 or more.", hint="--batch-size 1")
    if UNQUANTIZED in variants:
        raise ConfigError(
            f"a variant is named {UNQUANTIZED!r}, the name of the first row.",
            hint="give it another name",
        )


def _batches(rows: list[Tensor], batch_size: int) -> list[list[Tensor]]:
    """Neighbours of one length, at most ``batch_size`` of them, in order."""
    batches: list[list[Tensor]] = []
    for row in rows:
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and len(last[0]) == len(row):
            last.append(row)
        else:
            batches.append([row])
    return batches


def _check_finite(name: str, window: int, value: float) -> None:
    if torch.isfinite(torch.tensor(value)):
        return
    if name == UNQUANTIZED:
        raise CalibrationError(
            f"the unquantized model gave NaN or infinite logits in window {window}.",
            hint="--dtype bfloat16 or --dtype float32 (float16 overflows in some models)",
        )
    raise CalibrationError(
        f"{name} gave NaN or infinite logits in window {window}; the unquantized model's are "
        "finite there.",
        hint="calibrate it again: its codebooks or thresholds are not usable",
    )


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
