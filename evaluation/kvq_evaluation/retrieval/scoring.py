"""How well a model answers retrieval examples with each of several caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath, Variant
from kvq_evaluation.retrieval.examples import RetrievalExample
from kvq_formats.errors import CalibrationError, ConfigError, DataError
from kvq_formats.progress import Progress, SilentProgress
from kvq_runtime.cache_argument import cache_name, returned_cache
from kvq_runtime.offload import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExampleScore:
    """One example with one cache: share of the answer's items that are right, and nll in nats."""

    accuracy: float
    nll: float


def score_examples(
    model: PreTrainedModel,
    examples: Sequence[RetrievalExample],
    *,
    variants: Mapping[str, Variant],
    path: MeasuredPath | Mapping[str, MeasuredPath] = "prefill",
    progress: Progress | None = None,
) -> dict[str, list[ExampleScore]]:
    """Answer every example with the unquantized model and with each variant.

    Args:
        model: a causal language model; runs in evaluation mode, without gradients.
        examples: N of any tasks and lengths.
        variants: by name; each is entered once an example.
        path: ``prefill``: one forward over prompt and answer, without a cache. ``decode``: one over
            the prompt, then one a token of the answer, through the cache that the first returned.
            The unquantized model always runs as one forward. May be given by variant.
        progress: told of a step for each example and cache.

    Answers are teacher-forced on both paths: a token is predicted after the right ones before it. A
    whole answer is right that way exactly if greedy decoding would have given it. RULER looks for
    the items of a list anywhere in free text; here each has its place.

    Returns N scores by name, the unquantized model's first. Raises DataError where there is no
    example, ConfigError for an unknown path or a variant named as the unquantized model,
    CalibrationError for logits that are not finite.
    """
    paths = dict.fromkeys(variants, path) if isinstance(path, str) else dict(path)
    _check(examples, variants, [path] if isinstance(path, str) else list(path.values()))
    scores: dict[str, list[ExampleScore]] = {name: [] for name in (UNQUANTIZED, *variants)}
    device = input_device(model)
    listener = progress or SilentProgress()
    with (
        torch.no_grad(),
        _evaluation_mode(model),
        listener.stage("retrieve", len(examples) * len(scores)) as done,
    ):
        for example in examples:
            logits = _prefilled(model, example, device)
            scores[UNQUANTIZED].append(_score(UNQUANTIZED, logits, example))
            done()
            for name, context in variants.items():
                answer = _prefilled if paths[name] == "prefill" else _decoded
                with context():
                    logits = answer(model, example, device)
                scores[name].append(_score(name, logits, example))
                done()
    return scores


def _prefilled(model: PreTrainedModel, example: RetrievalExample, device: torch.device) -> Tensor:
    """Logits ``[A, V]`` that predict the answer, of one forward without a cache."""
    A = len(example.answer_ids)
    input_ids = torch.cat([example.prompt_ids, example.answer_ids])[None].to(device)
    logits = model(input_ids=input_ids, use_cache=False, **_kept(model, A + 1)).logits
    answers: Tensor = logits[0, -A - 1 : -1]
    return answers


def _decoded(model: PreTrainedModel, example: RetrievalExample, device: torch.device) -> Tensor:
    """The same, the answer token by token through the cache that the prompt's forward returned."""
    name = cache_name(model.forward)
    output = model(input_ids=example.prompt_ids[None].to(device), use_cache=True, **_kept(model, 1))
    steps = [output.logits[0, -1]]
    for token in example.answer_ids[:-1].to(device):
        cache = returned_cache(output)
        output = model(input_ids=token.view(1, 1), use_cache=True, **{name: cache})
        steps.append(output.logits[0, -1])
    return torch.stack(steps)


def _kept(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """Asks for the last logits only, where the model can: a long prompt's take gigabytes."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": tokens} if known else {}


def _score(name: str, logits: Tensor, example: RetrievalExample) -> ExampleScore:
    """Share of the items whose tokens all come first, and the answer's nll in nats."""
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise CalibrationError(
            f"{name} gave NaN or infinite logits in an example of {example.task}.",
            hint="--dtype bfloat16 or --dtype float32 (float16 overflows in some models)",
        )
    right = logits.argmax(-1) == example.answer_ids
    items = [bool(item.all()) for item in right.split(list(example.item_tokens))]
    nll = -logits.log_softmax(-1).gather(-1, example.answer_ids[:, None]).sum()
    return ExampleScore(sum(items) / len(items), float(nll))


def _check(
    examples: Sequence[RetrievalExample], variants: Mapping[str, Variant], paths: Sequence[str]
) -> None:
    if not examples:
        raise DataError("there is no retrieval example, expected at least one.")
    for path in paths:
        if path not in get_args(MeasuredPath):
            raise ConfigError(
                f"path is {path!r}, expected 'prefill' or 'decode'.", hint="--path prefill"
            )
    if UNQUANTIZED in variants:
        raise ConfigError(
            f"a variant is named {UNQUANTIZED!r}, the name of the first rows.",
            hint="give it another name",
        )


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
