"""The small model that was trained on the tasks: what it can do, and what caches do to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

import kvq
from garbage import with_garbage_codebooks
from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.retrieval import (
    RETRIEVAL_TASKS,
    evaluate_retrieval,
    retrieval_examples,
    retrieval_of_caches,
)
from kvq_formats.errors import ConfigError
from kvq_formats.sidecar import Sidecar
from retrieval_model import RETRIEVAL_MODEL

TASKS = tuple(RETRIEVAL_TASKS)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(RETRIEVAL_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(RETRIEVAL_MODEL)


@pytest.fixture(scope="module")
def four_bits() -> Sidecar:
    text = str(RETRIEVAL_MODEL / "calibration.txt")
    return kvq.calibrate(RETRIEVAL_MODEL, bits=4, dataset=text, num_samples=4, seq_len=512)


def test_it_finds_what_texts_say(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    rows = evaluate_retrieval(model, tokenizer, [], tasks=TASKS, tokens=1024, count=4, seed=77)
    assert [row.task for row in rows] == list(TASKS)
    assert {row.name for row in rows} == {UNQUANTIZED}
    accuracy = {row.task: row.accuracy for row in rows}
    assert accuracy["passkey"] == accuracy["multi_key"] == 1
    assert accuracy["variable_tracking"] > 0.9
    # It knows the most common word, and is apt to name it again.
    assert accuracy["common_words"] > 0.3


@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_garbage_codebooks_wreck_retrieval_and_four_bits_do_not(
    model: LlamaForCausalLM, tokenizer: Tokenizer, four_bits: Sidecar, path: str
) -> None:
    examples = retrieval_examples(
        tokenizer, ["passkey", "multi_key"], tokens=560, count=3, seed=0, positions=1024
    )
    sidecars = {"4 bit": four_bits, "garbage": with_garbage_codebooks(four_bits)}
    rows = retrieval_of_caches(model, examples, sidecars, path=path)
    accuracy = {(row.task, row.name): row.accuracy for row in rows}
    for task in ("passkey", "multi_key"):
        assert accuracy[task, UNQUANTIZED] == 1
        assert accuracy[task, "4 bit"] == 1
        # Under the runtime rule the last page of 256 tokens is exact, and what it holds is found.
        assert accuracy[task, "garbage"] < 0.7


def test_a_sidecar_may_be_given_by_its_folder(
    model: LlamaForCausalLM, tokenizer: Tokenizer, four_bits: Sidecar, tmp_path: Path
) -> None:
    folder = four_bits.save(tmp_path / "q4")
    given = {"tasks": ["passkey"], "tokens": 300, "count": 2, "path": ("prefill", "decode")}
    by_folder = kvq.evaluate_retrieval(model, tokenizer, [folder], **given)
    assert [(row.name, row.path) for row in by_folder] == [
        (UNQUANTIZED, "prefill"),
        ("q4", "prefill"),
        ("q4", "decode"),
    ]
    by_object = kvq.evaluate_retrieval(model, tokenizer, [four_bits], **given)
    assert [row.nll for row in by_object] == [row.nll for row in by_folder]


def test_texts_longer_than_the_model_reads_are_refused(
    model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match="longer than the model reads"):
        evaluate_retrieval(model, tokenizer, [], tasks=["passkey"], tokens=1025, count=1)


def test_the_text_to_calibrate_on_is_known_to_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = (RETRIEVAL_MODEL / "calibration.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    # 16 windows of 2,048 tokens, the default, fit in.
    assert len(ids) > 16 * 2048
