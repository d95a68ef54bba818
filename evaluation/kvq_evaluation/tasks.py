"""Tasks of lm_eval (EleutherAI's evaluation harness) on quantized caches, in this process.

lm_eval scores answers in one forward over question and answer, and a cache that quantizes what it
stores hands that forward exact keys and values: nothing quantized would be read. So likelihoods
are measured under the evaluation rule, and generated text under the runtime rule, by the kind of
request and not by the task list.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from kvq_evaluation.lm_eval_quiet import quiet_lm_eval, tasks_seeded
from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.task_loading import SEED, LoadedTasks, check_installed, load_tasks
from kvq_evaluation.task_rows import TaskRow, task_rows, with_differences
from kvq_formats.errors import ConfigError
from kvq_formats.progress import Progress, SilentProgress
from kvq_formats.sidecar import Sidecar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_evaluation.lm_eval_model import KVQLM, CacheVariant
    from kvq_runtime.evaluation_rule import CacheCodec

BOOTSTRAP = 1000
"""Resamples for standard errors that have no formula."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sidecars: Mapping[str, Sidecar],
    tasks: Sequence[str] | LoadedTasks,
    *,
    codecs: Mapping[str, CacheCodec] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    seed: int = SEED,
    include_path: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[TaskRow]:
    """Run tasks with the unquantized model and with each cache, on the same prompts.

    Args:
        model, tokenizer: a causal language model, loaded, and its tokenizer; both are as before
            afterwards.
        sidecars: by the name that their rows get.
        tasks: names, or what ``load_tasks`` returned; then ``num_fewshot`` and ``include_path``
            have been said there.
        codecs: other caches, by name. They have no packed form, so that they cannot generate.
        limit: documents a task; None for all.
        batch_size: texts a forward.
        seed: of examples in prompts, and of sampling where a task samples.
        progress: told of each answered request.

    Returns the unquantized model's rows, then those of each sidecar and each codec, tasks in
    lm_eval's order. Standard errors without a formula are bootstrapped with 1,000 resamples.

    Raises what ``load_tasks`` raises, FingerprintMismatchError for a sidecar of another model, and
    ConfigError for a limit or batch size below 1, names that occur twice, and codecs that a task
    asks to generate.
    """
    check_installed()
    from kvq_evaluation.lm_eval_model import KVQLM
    from kvq_runtime.attach import fitting_sidecar

    codecs = codecs or {}
    _check(sidecars, codecs, limit=limit, batch_size=batch_size)
    for sidecar in sidecars.values():
        fitting_sidecar(model, sidecar)
    if not isinstance(tasks, LoadedTasks):
        tasks = load_tasks(tasks, num_fewshot=num_fewshot, include_path=include_path, seed=seed)
    for task in tasks.tasks.values():
        if codecs and task.OUTPUT_TYPE == "generate_until":
            _cannot_generate(next(iter(codecs)), task.task_name)
    variants = _variants(model, sidecars, codecs)
    rows: list[TaskRow] = []
    # The stage is opened first: bars on a terminal take stdout over and must give it back last.
    listener = progress or SilentProgress()
    training = model.training
    with listener.stage("run tasks", len(variants)) as done, quiet_lm_eval():
        try:
            for variant in variants:
                with tasks_seeded(seed, model):
                    lm = KVQLM(
                        model,
                        tokenizer,
                        variant=variant,
                        batch_size=batch_size,
                        progress=listener,
                    )
                    rows += _evaluated(lm, tasks, limit=limit, seed=seed)
                done()
        finally:
            model.train(training)
    return with_differences(rows)


def _check(
    sidecars: Mapping[str, Sidecar],
    codecs: Mapping[str, CacheCodec],
    *,
    limit: int | None,
    batch_size: int,
) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected 1 or more.", hint="--limit 100")
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}, expected 1 or more.", hint="--batch-size 1")
    names = [UNQUANTIZED, *sidecars, *codecs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two caches are named {twice!r}.", hint="give one another name")


def _cannot_generate(name: str, task: str | None = None) -> NoReturn:
    raise ConfigError(
        f"{task or 'a task'} generates text, but {name} has no packed cache to generate with.",
        hint="tasks that compare likelihoods, such as arc_easy, hellaswag or mmlu",
    )


def _variants(
    model: PreTrainedModel, sidecars: Mapping[str, Sidecar], codecs: Mapping[str, CacheCodec]
) -> list[CacheVariant]:
    from kvq_evaluation.lm_eval_model import CacheVariant
    from kvq_runtime.attach import attach
    from kvq_runtime.evaluation_rule import attach_codec

    return [
        CacheVariant(UNQUANTIZED, scoring=nullcontext, generating=nullcontext),
        *(
            CacheVariant(
                name,
                scoring=partial(attach, model, sidecar, rule="evaluation"),
                generating=partial(attach, model, sidecar, rule="runtime"),
            )
            for name, sidecar in sidecars.items()
        ),
        *(
            CacheVariant(
                name,
                scoring=partial(attach_codec, model, codec),
                generating=partial(_cannot_generate, name),
            )
            for name, codec in codecs.items()
        ),
    ]


def _evaluated(lm: KVQLM, tasks: LoadedTasks, *, limit: int | None, seed: int) -> list[TaskRow]:
    """One variant's rows."""
    from lm_eval import evaluate

    for task in tasks.tasks.values():
        # Anew, for the examples are drawn one by one.
        task.set_fewshot_seed(seed=seed)
    results = evaluate(
        lm,
        {"tasks": tasks.tasks, "groups": tasks.groups, "group_map": tasks.group_map},
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
    )
    return task_rows(
        results, tasks, name=lm.variant.name, longest=lm.longest, truncated=lm.truncated
    )
