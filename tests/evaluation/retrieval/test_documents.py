"""Texts of retrieval tasks, solved by other means than a model: what is asked is in the text."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_evaluation.retrieval.documents import CHAIN_VARIABLES, RETRIEVAL_TASKS, Document
from kvq_evaluation.retrieval.words import FILLER, NUMBERS, WORDS

TASKS = list(RETRIEVAL_TASKS)


def made(task: str, seed: int, parts: int) -> Document:
    return RETRIEVAL_TASKS[task].build(random.Random(seed), parts)


def solved(task: str, text: str, question: str) -> list[str]:
    """The answer, found in the text with regular expressions."""
    if task == "passkey":
        return re.findall(r"The passkey is (\d+)\.", text)
    if task == "multi_key":
        (key,) = re.findall(r"number for (\w+)\?", question)
        return re.findall(rf"The number for {key} is (\d+)\.", text)
    if task == "variable_tracking":
        (value,) = re.findall(r"hold (\d+)\?", question)
        found = []
        while followers := re.findall(rf"Let (\w+) = {value}\.", text):
            (value,) = followers
            found.append(value)
        return found
    listed = re.findall(r"\w+", text.split(": ")[1])
    return [word for word, _ in Counter(listed).most_common(3)]


@given(st.sampled_from(TASKS), st.integers(0, 10**6), st.integers(0, 300))
def test_every_question_is_answered_by_the_text(task: str, seed: int, more: int) -> None:
    document = made(task, seed, RETRIEVAL_TASKS[task].least + more)
    for question in document.questions:
        assert solved(task, document.text, question.text) == list(question.items)


@given(st.sampled_from(TASKS), st.integers(0, 10**6), st.integers(0, 300))
def test_a_text_has_as_many_parts_as_asked_for(task: str, seed: int, more: int) -> None:
    parts = RETRIEVAL_TASKS[task].least + more
    text = made(task, seed, parts).text
    if task == "common_words":
        assert len(text.removeprefix("Here is a list of words: ").split()) == parts
    else:
        assert len(re.findall(r"\.", text)) == parts


@pytest.mark.parametrize("task", TASKS)
def test_seeds_make_texts(task: str) -> None:
    texts = [made(task, seed, 60).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_most_common_words_are_apart_from_the_others() -> None:
    for parts in (24, 100, 1000):
        text = made("common_words", parts, parts).text
        counts = [count for _, count in Counter(text.split(": ")[1][:-1].split()).most_common()]
        assert counts[0] > counts[1] > counts[2] > counts[3]


def test_chains_keep_their_order_in_the_text() -> None:
    document = made("variable_tracking", 3, 120)
    assert len(document.questions) > 2
    for question in document.questions:
        places = [document.text.index(f"Let {name} = ") for name in question.items]
        assert len(places) == CHAIN_VARIABLES
        assert places == sorted(places)


def test_the_first_question_may_be_about_any_place_of_a_text() -> None:
    places = []
    for seed in range(40):
        document = made("multi_key", seed, 40)
        (number,) = document.questions[0].items
        places.append(document.text.index(number) / len(document.text))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_words_name_one_thing() -> None:
    of_sentences = set(re.findall(r"\w+", " ".join(FILLER).lower()))
    assert not of_sentences & set(WORDS)
    assert len(set(WORDS)) == len(WORDS)
    assert len(set(NUMBERS)) == len(NUMBERS) == 900
