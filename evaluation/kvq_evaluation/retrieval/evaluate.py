"""Retrieval with sidecars and baselines: tasks by name in, rows of a table out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvq_evaluation.baselines.named import Baseline
from kvq_evaluation.caches import cache_bits
from kvq_evaluation.perplexity import MeasuredPath
from kvq_evaluation.retrieval.examples import RetrievalExample, make_examples
from kvq_evaluation.retrieval.rows import RetrievalRow, retrieval_rows
from kvq_evaluation.retrieval.scoring import score_examples
from kvq_evaluation.sidecars import row_names
from kvq_evaluation.variants import cache_variants, row_of_variant
from kvq_formats.errors import ConfigError
from kvq_formats.progress import Progress
from kvq_formats.sidecar import Sidecar
from kvq_runtime.supported_models import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sidecars: Sequence[Sidecar | str | os.PathLike[str]],
    *,
    tasks: Sequence[str],
    tokens: int,
    count: int = 50,
    seed: int = 0,
    path: MeasuredPath | Sequence[MeasuredPath] = "prefill",
    progress: Progress | None = None,
) -> list[RetrievalRow]:
    """Measure how well a model retrieves from generated texts, without and with each sidecar.

    Args:
        model, tokenizer: the causal language model that the sidecars were made for.
        sidecars: objects, folders or files; none measures the model alone.
        tasks: some of ``passkey``, ``multi_key``, ``variable_tracking``, ``common_words``.
        tokens: the most that prompt and answer have together; texts fill it to 98 % or more.
        count: examples a task.
        seed: chooses the texts.
        path: ``prefill``: one forward an example under the evaluation rule; ``decode``: the prompt
            and then the answer token by token through the packed cache; or both.
        progress: who hears how far it is.

    Returns rows task by task, in each the unquantized model's first. Raises ConfigError for an
    unknown task or path, a count below 1, and tokens that are too few for a task or more than the
    model's positions; SidecarError, FingerprintMismatchError.
    """
    examples = retrieval_examples(
        tokenizer,
        tasks,
        tokens=tokens,
        count=count,
        seed=seed,
        positions=text_config(model.config).get("max_position_embeddings"),
    )
    loaded = [s if isinstance(s, Sidecar) else Sidecar.load(s) for s in sidecars]
    held = dict(zip(row_names(sidecars), loaded, strict=True))
    return retrieval_of_caches(model, examples, held, path=path, progress=progress)


def retrieval_examples(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    tokens: int,
    count: int,
    seed: int,
    positions: int | None = None,
) -> list[RetrievalExample]:
    """Make ``count`` examples of each task, task by task.

    ``positions`` is how many the model has, None where it has no bound. Raises ConfigError for more
    tokens than that, no task, and what ``make_examples`` raises.
    """
    if not tasks:
        raise ConfigError("no retrieval task is named, expected at least one.", hint="passkey")
    if positions is not None and tokens > positions:
        raise ConfigError(
            f"retrieval texts of {tokens} tokens are longer than the model reads, expected at most "
            f"its {positions} positions.",
            hint=f"--retrieval-tokens {positions}",
        )
    return [
        example
        for task in dict.fromkeys(tasks)
        for example in make_examples(tokenizer, task, tokens=tokens, count=count, seed=seed)
    ]


def retrieval_of_caches(
    model: PreTrainedModel,
    examples: Sequence[RetrievalExample],
    sidecars: Mapping[str, Sidecar],
    baselines: Mapping[str, Baseline] | None = None,
    *,
    path: MeasuredPath | Sequence[MeasuredPath] = "prefill",
    progress: Progress | None = None,
) -> list[RetrievalRow]:
    """Answer examples with sidecars and baselines, all on the same texts.

    Args:
        model, examples, progress: as for ``score_examples``.
        sidecars, baselines: by the name that their rows get.
        path: as for ``evaluate_caches``.

    Returns rows task by task: in each the unquantized model's, then for each path one a sidecar and
    one a baseline. Raises what ``score_examples`` and ``cache_variants`` raise, and
    FingerprintMismatchError for a sidecar of another model.
    """
    held = cache_variants(model, sidecars, baselines, path=path)
    scores = score_examples(
        model,
        examples,
        variants={variant: one.context for variant, one in held.items()},
        path={variant: one.forwards for variant, one in held.items()},
        progress=progress,
    )
    longest = max(example.tokens for example in examples)
    bits = cache_bits(model, sidecars, baselines or {}, tokens=longest)
    return retrieval_rows(
        examples, scores, row_of_variant(held), {name: one for name, (one, _) in bits.items()}
    )
