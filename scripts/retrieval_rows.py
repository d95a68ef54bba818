"""Rows of tokens to train on: documents with many questions, and drills of what they ask for."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvq_evaluation.retrieval.documents import CHAIN_VARIABLES, RETRIEVAL_TASKS, Document
from kvq_evaluation.retrieval.words import NUMBERS, WORDS

TASK_SHARES = {"passkey": 1, "multi_key": 3, "variable_tracking": 3, "common_words": 3}
"""How often a document is of each task."""

ANSWER_WEIGHTS = {"passkey": 4.0, "multi_key": 1.0, "variable_tracking": 1.0, "common_words": 3.0}
"""Weight of an answer's token in the loss: more where a text has few."""

DRILL_WEIGHT = 0.5
TEXT_WEIGHT = 0.05
"""Weight of any other token of a document: enough to make the model one of the texts, too."""

Weighted = list[tuple[int, float]]
"""Tokens, each with its weight in the loss as what is predicted."""


class Rows:
    """Draws rows for training, from one random source."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._bos, self._pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        self._words = tokenizer.convert_tokens_to_ids(list(WORDS))
        self._numbers = tokenizer.convert_tokens_to_ids(list(NUMBERS))
        self._source = random.Random(f"train/{seed}")

    def draw(self, count: int, length: int, *, drills: float) -> tuple[Tensor, Tensor]:
        """Ids, int64 ``[count, length]``, and weights, f32; a share of ``drills`` are drills."""
        drawn = []
        for _ in range(count):
            row = [(self._bos, 0.0)]
            if self._source.random() < drills:
                row += self._source.choice((self._copies, self._pairs, self._chains))(length)
            else:
                row += self._document(length)
            row += [(self._pad, 0.0)] * length
            drawn.append(row[:length])
        return (
            torch.tensor([[token for token, _ in row] for row in drawn]),
            torch.tensor([[weight for _, weight in row] for row in drawn]),
        )

    def _document(self, length: int) -> Weighted:
        """A text and as many of its questions, with their answers, as there is room for."""
        task = self._source.choices(list(TASK_SHARES), list(TASK_SHARES.values()))[0]
        document, row = self._text(task, length)
        for question in document.questions:
            asked = self._weighted(question.text, TEXT_WEIGHT)
            asked += self._weighted(" ".join(question.items), ANSWER_WEIGHTS[task])
            asked += self._weighted(".", TEXT_WEIGHT)
            if len(row) + len(asked) >= length:
                break
            row += asked
        return row

    def _text(self, task: str, length: int) -> tuple[Document, Weighted]:
        """A document, and its text without questions, with room for one of them at least."""
        made = RETRIEVAL_TASKS[task]
        has_many = task in ("multi_key", "variable_tracking")
        share = self._source.uniform(0.35 if has_many else 0.6, 1.0)
        parts = max(made.least, int(length * share / (1 if task == "common_words" else 7)))
        while True:
            document = made.build(self._source, parts)
            text = self._weighted(document.text, TEXT_WEIGHT)
            question = document.questions[0]
            room = length - 3 - len(self._ids(" ".join([question.text, *question.items])))
            if len(text) <= room or parts == made.least:
                return document, text
            parts = max(made.least, int(parts * 0.97 * room / len(text)))

    def _copies(self, length: int) -> Weighted:
        """Short runs of random words, then the same runs in another order."""
        runs = []
        left = (length - 1) // 2
        while left > 1:
            run = self._source.choices(
                self._words + self._numbers, k=min(left, self._source.randint(2, 8))
            )
            left -= len(run)
            runs.append(run)
        said = _unweighted(token for run in runs for token in run)
        self._source.shuffle(runs)
        for first, *rest in runs:
            said += [(first, 0.0), *((token, DRILL_WEIGHT) for token in rest)]
        return said

    def _pairs(self, length: int) -> Weighted:
        """``acorn is 471.`` for many words, then all of it in another order."""
        count = max(2, min(length // 8, len(self._words)))
        keys, numbers = self._source.sample(self._words, count), self._numbers
        pairs = [(key, self._source.choice(numbers)) for key in keys]
        link, period = self._ids("is .")
        said = _unweighted(t for key, number in pairs for t in (key, link, number, period))
        self._source.shuffle(pairs)
        for key, number in pairs:
            said += [*_unweighted((key, link)), (number, 2 * DRILL_WEIGHT), (period, 0.0)]
        return said

    def _chains(self, length: int) -> Weighted:
        """``actor = acorn.`` of chains that lie between each other, then chain by chain."""
        count = max(2, min(length // 22, len(self._words) // CHAIN_VARIABLES))
        names = self._source.sample(self._words, CHAIN_VARIABLES * count)
        chains = [
            [self._source.choice(self._numbers), *names[start : start + CHAIN_VARIABLES]]
            for start in range(0, len(names), CHAIN_VARIABLES)
        ]
        turns = [index for index in range(count) for _ in range(CHAIN_VARIABLES)]
        self._source.shuffle(turns)
        steps = [iter(zip(chain[1:], chain, strict=False)) for chain in chains]
        equals, link, period = self._ids("= are .")
        said: Weighted = []
        for index in turns:
            name, value = next(steps[index])
            said += _unweighted((name, equals, value, period))
        self._source.shuffle(chains)
        for number, *chain in chains:
            said += _unweighted((number, link))
            said += [*((name, DRILL_WEIGHT) for name in chain), (period, 0.0)]
        return said

    def _weighted(self, text: str, weight: float) -> Weighted:
        return [(token, weight) for token in self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _unweighted(tokens: Iterable[int]) -> Weighted:
    return [(token, 0.0) for token in tokens]
