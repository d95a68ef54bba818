"""Texts that hide something, and questions about it, in the manner of RULER.

RULER (Hsieh et al., COLM 2024, arXiv 2404.06654, section 3) hides numbers in filler, chains of
variables and common words in texts of any length. The texts here are smaller and plainer, so that a
model of a million weights can be trained on them: numbers have three digits and keys are one word.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kvq_evaluation.retrieval.words import FILLER, NUMBERS, WORDS

NEEDLE_SHARE = 2
"""One of so many sentences is a needle, as far as there are words to name needles with."""

CHAIN_VARIABLES = 4
"""Variables of a chain; RULER's chains have five."""

COMMON_SHARES = (0.24, 0.16, 0.10)
"""Shares of a list that its most common words take; any other word's share is far below."""


@dataclass(frozen=True)
class Question:
    """A question, up to where its answer begins, and the answer's items in the order expected."""

    text: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text and the questions that can be asked about it, in no particular order."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class RetrievalTask:
    """How a task's documents are made.

    Fields:
        build: random source and number of parts (sentences; words for a list) -> document.
        least: the smallest number of parts.
    """

    build: Callable[[random.Random, int], Document]
    least: int


def passkey(source: random.Random, parts: int) -> Document:
    """One number in filler (Mohtashami and Jaggi, arXiv 2305.16300; RULER's first needle task)."""
    number = source.choice(NUMBERS)
    text = _scattered(source, [[f"The passkey is {number}."]], parts)
    return Document(text, (Question("What is the passkey? The passkey is", (number,)),))


def multi_key(source: random.Random, parts: int) -> Document:
    """Keys with numbers in filler, one of which is asked for (RULER: multi-key needles)."""
    count = max(2, min(parts // NEEDLE_SHARE, len(WORDS)))
    pairs = list(zip(source.sample(WORDS, count), source.sample(NUMBERS, count), strict=True))
    needles = [[f"The number for {key} is {number}."] for key, number in pairs]
    questions = [
        Question(f"What is the number for {key}? The number for {key} is", (number,))
        for key, number in pairs
    ]
    return _asked(source, _scattered(source, needles, parts), questions)


def variable_tracking(source: random.Random, parts: int) -> Document:
    """Chains of variables that hold one number each (RULER: variable tracking).

    A chain's assignments keep their order; several chains lie between each other. The answer names
    the variables of one chain in that order.
    """
    count = max(2, min(parts // (NEEDLE_SHARE * CHAIN_VARIABLES), len(WORDS) // CHAIN_VARIABLES))
    names = source.sample(WORDS, count * CHAIN_VARIABLES)
    chains, questions = [], []
    for index, number in enumerate(source.sample(NUMBERS, count)):
        chain = names[index * CHAIN_VARIABLES : (index + 1) * CHAIN_VARIABLES]
        values = [number, *chain[:-1]]
        chains.append([f"Let {name} = {value}." for name, value in zip(chain, values, strict=True)])
        questions.append(
            Question(
                f"Which variables hold {number}? The variables that hold {number} are",
                tuple(chain),
            )
        )
    return _asked(source, _scattered(source, chains, parts), questions)


def common_words(source: random.Random, parts: int) -> Document:
    """A list of words, a few of which are common (RULER: common and frequent words extraction).

    As in RULER's frequent words, the three most common words are asked for, with clear distances
    between their counts; as in its common words, the rest of the list is flat. The answer begins
    with the most common one.
    """
    drawn = source.sample(WORDS, len(WORDS))
    common, rest = drawn[: len(COMMON_SHARES)], drawn[len(COMMON_SHARES) :]
    listed = [
        word
        for word, share in zip(common, COMMON_SHARES, strict=True)
        for _ in range(round(share * parts))
    ]
    listed += [rest[index % len(rest)] for index in range(parts - len(listed))]
    source.shuffle(listed)
    question = Question(
        "Which three words are the most common, the most common first? They are", tuple(common)
    )
    return Document(f"Here is a list of words: {' '.join(listed)}.", (question,))


RETRIEVAL_TASKS: Final[Mapping[str, RetrievalTask]] = {
    "passkey": RetrievalTask(passkey, least=1),
    "multi_key": RetrievalTask(multi_key, least=2),
    "variable_tracking": RetrievalTask(variable_tracking, least=2 * CHAIN_VARIABLES),
    # The fewest words at which the three shares round to different counts above 1: 6, 4 and 2.
    "common_words": RetrievalTask(common_words, least=24),
}


def _asked(source: random.Random, text: str, questions: list[Question]) -> Document:
    """The questions shuffled, so that the first one may be about any place of the text."""
    source.shuffle(questions)
    return Document(text, tuple(questions))


def _scattered(source: random.Random, chains: list[list[str]], parts: int) -> str:
    """``parts`` sentences: each chain's in their order at random places, filler in the others."""
    total = sum(len(chain) for chain in chains)
    is_needle = [True] * total + [False] * max(0, parts - total)
    source.shuffle(is_needle)
    turns = [index for index, chain in enumerate(chains) for _ in chain]
    source.shuffle(turns)
    needles = iter(turns)
    rest = [iter(chain) for chain in chains]
    return " ".join(
        next(rest[next(needles)]) if needle else source.choice(FILLER) for needle in is_needle
    )
