"""Perplexity and divergence of many variants of one model in one pass over the same windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kvq_evaluation.divergence import token_metrics
from kvq_evaluation.statistics import WindowMetrics
from kvq_formats.errors import CalibrationError, ConfigError, DataError
from kvq_formats.progress import Progress, SilentProgress
from kvq_runtime.cache_argument import cache_name, returned_cache
from kvq_runtime.offload import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Variant = Callable[[], AbstractContextManager[object]]
"""Makes a context manager inside which the model runs with a quantized cache."""

UNQUANTIZED = "unquantized"

MeasuredPath = Literal["prefill", "decode"]
"""How a variant reads a window: in one forward, or token by token through its cache."""

WindowSums = tuple[int, float, float, int]
"""Tokens scored in a window, and over them the sums of nll and KL in nats and of agreement."""

PIECE_TOKENS = 64
"""Tokens that decoding scores at a time; each such piece is a step of progress."""


def evaluate(
    model: PreTrainedModel,
    windows: Tensor | Sequence[Tensor],
    *,
    variants: Mapping[str, Variant],
    path: MeasuredPath | Mapping[str, MeasuredPath] = "prefill",
    batch_size: int = 1,
    scored: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[WindowMetrics]:
    """Score every window under the unquantized model and under each variant.

    Args:
        model: a causal language model; runs in evaluation mode, without gradients.
        windows: int64 ``[S, T]``, or a sequence of int64 ``[T_i]``: consecutive pieces of a text
            that do not overlap, unless ``scored`` leaves out what an earlier one scored. A window
            of T tokens scores T - 1. Batches hold windows of one length, so nothing is padded.
        variants: by name; each is entered once a batch.
        path: ``prefill``: a variant runs as one forward without a cache. ``decode``: it runs as one
            forward a token, and the cache that its first forward returns is handed to the others;
            every batch begins without one. The unquantized model always runs as one forward. May be
            given by variant.
        batch_size: windows a forward pass.
        scored: for each window, how many of its last tokens count; without, all but the first.
        progress: told of a step for each forward over whole windows, and for each ``PIECE_TOKENS``
            tokens of a variant that decodes.

    Returns the unquantized model's metrics first, then one for each variant in the order given. For
    each batch the unquantized model runs once and its logits are dropped before the next batch: two
    ``[batch_size, T, V]`` tensors live at a time, in the model's dtype; where variants decode, one
    and what ``PIECE_TOKENS`` tokens give.

    Raises DataError where there is nothing to score, ConfigError for a batch size below 1, an
    unknown path, counts in ``scored`` that do not fit the windows or a variant named as the
    unquantized model, CalibrationError for logits that are not finite (naming the variant).
    """
    rows = [window.reshape(-1) for window in windows]
    paths = dict.fromkeys(variants, path) if isinstance(path, str) else dict(path)
    _check(rows, variants, [path] if isinstance(path, str) else list(path.values()), batch_size)
    counts = [len(row) - 1 for row in rows] if scored is None else list(scored)
    _check_scored(rows, counts)
    scores: dict[str, list[WindowSums]] = {name: [] for name in (UNQUANTIZED, *variants)}
    token_kl: dict[str, list[Tensor]] = {name: [] for name in scores}
    batches = _batches(rows, batch_size)
    device = input_device(model)
    listener = progress or SilentProgress()
    forwards = sum(_num_pieces(len(batch[0]), one) for batch in batches for one in paths.values())
    with (
        torch.no_grad(),
        _evaluation_mode(model),
        listener.stage("evaluate", len(batches) + forwards) as done,
    ):
        for batch in batches:
            input_ids = torch.stack(batch).to(device)
            reference = _whole(model, input_ids)
            first = len(scores[UNQUANTIZED])
            labels = _Labels(input_ids, counts[first : first + len(batch)], first_window=first)
            sums, each = _score(UNQUANTIZED, [reference], reference, labels, done)
            scores[UNQUANTIZED] += sums
            token_kl[UNQUANTIZED] += each
            for name, context in variants.items():
                with context():
                    pieces = _pieces(model, input_ids, paths[name])
                    sums, each = _score(name, pieces, reference, labels, done)
                scores[name] += sums
                token_kl[name] += each
            # Before the next batch's logits are made.
            del reference
    return [WindowMetrics.from_scores(name, sums, token_kl[name]) for name, sums in scores.items()]


@dataclass(frozen=True)
class _Labels:
    """What of a batch is scored.

    Fields:
        input_ids: int64 ``[B, T]``.
        scored: of each window, how many of its last tokens.
        first_window: number of the batch's first window, for errors.
    """

    input_ids: Tensor
    scored: Sequence[int]
    first_window: int


def _whole(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of one forward without a cache."""
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _pieces(model: PreTrainedModel, input_ids: Tensor, path: MeasuredPath) -> Iterator[Tensor]:
    """Logits ``[B, n, V]`` of consecutive tokens, as ``path`` says; the last token is optional.

    Decoding leaves it out: nothing comes after it that could be scored.
    """
    if path == "prefill":
        yield _whole(model, input_ids)
        return
    cache, name = None, cache_name(model.forward)
    for piece in input_ids[:, :-1].split(PIECE_TOKENS, dim=1):
        steps = []
        for token in piece.split(1, dim=1):
            output = model(input_ids=token, use_cache=True, **{name: cache})
            cache = returned_cache(output)
            steps.append(output.logits)
        yield torch.cat(steps, dim=1)


def _num_pieces(tokens: int, path: MeasuredPath) -> int:
    """How many tensors ``_pieces`` gives for a window of ``tokens`` tokens."""
    return 1 if path == "prefill" else -(-(tokens - 1) // PIECE_TOKENS)


def _score(
    name: str,
    pieces: Iterable[Tensor],
    reference: Tensor,
    labels: _Labels,
    done: Callable[[], None],
) -> tuple[list[WindowSums], list[Tensor]]:
    """Sums of each window of a batch, and the KL of its tokens, f32.

    Args:
        name: the variant, for errors.
        pieces: its logits ``[B, n, V]`` of consecutive tokens, together T or T - 1.
        reference: ``[B, T, V]``, the unquantized model's logits.
        labels: what is scored.
        done: called once a piece.
    """
    B, T = labels.input_ids.shape
    sums = [(0, 0.0, 0.0, 0)] * B
    each: list[list[Tensor]] = [[] for _ in range(B)]
    start = 0
    for logits in pieces:
        stop = min(start + logits.shape[1], T - 1)
        for row, ids in enumerate(labels.input_ids):
            first = max(start, T - 1 - labels.scored[row])
            if first >= stop:
                continue
            metrics = token_metrics(
                reference[row, first:stop],
                logits[row, first - start : stop - start],
                ids[first + 1 : stop + 1],
            )
            each[row].append(metrics.kl.float().cpu())
            nll, kl = float(metrics.nll.sum()), float(metrics.kl.sum())
            _check_finite(name, labels.first_window + row, nll + kl)
            tokens, nll_sum, kl_sum, agreement = sums[row]
            sums[row] = (
                tokens + stop - first,
                nll_sum + nll,
                kl_sum + kl,
                agreement + int(metrics.agrees.sum()),
            )
        start = stop
        done()
    return sums, [torch.cat(pieces_of_row) for pieces_of_row in each]


def _check(
    rows: list[Tensor],
    variants: Mapping[str, Variant],
    paths: Sequence[str],
    batch_size: int,
) -> None:
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
    for path in paths:
        if path not in get_args(MeasuredPath):
            raise ConfigError(
                f"path is {path!r}, expected 'prefill' or 'decode'.", hint="--path prefill"
            )
    if UNQUANTIZED in variants:
        raise ConfigError(
            f"a variant is named {UNQUANTIZED!r}, the name of the first row.",
            hint="give it another name",
        )


def _check_scored(rows: list[Tensor], counts: list[int]) -> None:
    if len(counts) != len(rows):
        raise ConfigError(f"scored has {len(counts)} counts for {len(rows)} windows.")
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if not 1 <= count < len(row):
            raise ConfigError(
                f"scored is {count} for window {number} of {len(row)} tokens, expected 1 to "
                f"{len(row) - 1}: the first token is only context."
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
