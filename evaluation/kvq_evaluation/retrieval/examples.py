"""Retrieval examples in tokens, made to a length by the tokenizer that the model comes with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_evaluation.retrieval.documents import RETRIEVAL_TASKS, Document
from kvq_formats.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FULL_ENOUGH = 0.98
"""A text that fills so much of its tokens is not made longer."""


@dataclass(frozen=True)
class RetrievalExample:
    """A prompt and its answer.

    Fields:
        task: one of ``RETRIEVAL_TASKS``.
        prompt_ids: int64 ``[T]``, text and question, with what the tokenizer puts before a text.
        answer_ids: int64 ``[A]``, what follows it.
        item_tokens: tokens of each of the answer's items, A in all.
        prompt: the prompt as text.
        items: the answer's items as text.
    """

    task: str
    prompt_ids: Tensor
    answer_ids: Tensor
    item_tokens: tuple[int, ...]
    prompt: str
    items: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_examples(
    tokenizer: PreTrainedTokenizerBase, task: str, *, tokens: int, count: int, seed: int
) -> list[RetrievalExample]:
    """Make ``count`` examples of a task, each as long as ``tokens`` allows.

    Args:
        tokenizer: any that ``transformers`` loads.
        task: one of ``RETRIEVAL_TASKS``.
        tokens: the most that prompt and answer have together. Texts grow by whole sentences or
            words, until they have 98 per cent of it or the next would be too many.
        count: examples.
        seed: example i depends on the task, the seed, i, ``tokens`` and the tokenizer.

    Raises ConfigError for an unknown task, a count below 1, and tokens too few for the task's
    smallest texts.
    """
    if task not in RETRIEVAL_TASKS:
        raise ConfigError(
            f"retrieval task {task!r} is unknown, expected one of {', '.join(RETRIEVAL_TASKS)}.",
            hint="passkey",
        )
    if count < 1:
        raise ConfigError(f"count is {count}, expected 1 or more examples.", hint="100")
    chosen = RETRIEVAL_TASKS[task]

    def document(index: int, parts: int) -> Document:
        return chosen.build(random.Random(f"{task}/{seed}/{index}"), parts)

    def length(document: Document) -> int:
        return len(_ids(tokenizer, _whole_text(document)))

    least = max(length(document(index, chosen.least)) for index in range(count))
    if tokens < least:
        raise ConfigError(
            f"{tokens} tokens are too few for {task}, expected at least {least} with this "
            "tokenizer.",
            hint=f"{least} tokens or more",
        )
    examples = []
    for index in range(count):

        def used(parts: int, index: int = index) -> int:
            return length(document(index, parts))

        parts = _fitting(used, chosen.least, tokens)
        examples.append(_encoded(tokenizer, task, document(index, parts)))
    return examples


def _fitting(length: Callable[[int], int], least: int, tokens: int) -> int:
    """The most parts whose length fits, or the first found that are full enough.

    Interpolates, for a text's length is nearly proportional to its parts.
    """
    low, used, high = least, length(least), None
    tokens_a_part = used / least
    while used < FULL_ENOUGH * tokens and (high is None or high - low > 1):
        guess = low + max(1, int((tokens - used) / tokens_a_part))
        if high is not None:
            guess = min(guess, high - 1)
        tried = length(guess)
        tokens_a_part = max(1.0, (tried - used) / (guess - low))
        if tried > tokens:
            high = guess
        else:
            low, used = guess, tried
    return low


def _encoded(tokenizer: PreTrainedTokenizerBase, task: str, document: Document) -> RetrievalExample:
    """A document with its first question.

    The text is encoded with its answer, as a model would have met it. The answer begins at the
    first token that the prompt alone does not have, for a tokenizer may join their border; the
    borders of the items are found alike.
    """
    question = document.questions[0]
    prompt = f"{document.text} {question.text}"
    whole = _ids(tokenizer, _whole_text(document))
    starts = []
    for index in range(len(question.items)):
        before = _ids(tokenizer, " ".join([prompt, *question.items[:index]]))
        starts.append(_shared(before, whole))
    stops = [*starts[1:], len(whole)]
    ids = torch.tensor(whole, dtype=torch.int64)
    return RetrievalExample(
        task=task,
        prompt_ids=ids[: starts[0]],
        answer_ids=ids[starts[0] :],
        item_tokens=tuple(stop - start for start, stop in zip(starts, stops, strict=True)),
        prompt=prompt,
        items=question.items,
    )


def _whole_text(document: Document) -> str:
    """The text, its first question and the answer."""
    question = document.questions[0]
    return " ".join([document.text, question.text, *question.items])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that goes on: without the end-of-text that some tokenizers add."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _shared(a: list[int], b: list[int]) -> int:
    """Tokens at the start that both have."""
    return next(
        (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
