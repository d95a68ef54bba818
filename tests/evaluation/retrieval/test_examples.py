"""Examples in tokens: how long they are, and which tokens are the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvq_evaluation.retrieval import RETRIEVAL_TASKS, make_examples, retrieval_examples
from kvq_formats.errors import ConfigError
from kvq_runtime.embedded import embedded_model_path
from retrieval_model import RETRIEVAL_MODEL

TASKS = list(RETRIEVAL_TASKS)


@pytest.fixture(scope="module", params=["bytes", "words"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The embedded model's byte-level BPE, and a token a word."""
    folder = embedded_model_path() if request.param == "bytes" else RETRIEVAL_MODEL
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [600, 2000])
def test_texts_fill_their_tokens(
    tokenizer: PreTrainedTokenizerBase, task: str, tokens: int
) -> None:
    for example in make_examples(tokenizer, task, tokens=tokens, count=3, seed=0):
        assert 0.98 * tokens <= example.tokens <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_those_of_prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, task: str
) -> None:
    (example,) = make_examples(tokenizer, task, tokens=500, count=1, seed=7)
    whole = torch.cat([example.prompt_ids, example.answer_ids]).tolist()
    assert whole == tokenizer(" ".join([example.prompt, *example.items]))["input_ids"]
    assert whole[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in whole
    spelled = [
        tokenizer.decode(item).strip() for item in example.answer_ids.split(example.item_tokens)
    ]
    assert spelled == list(example.items)


@pytest.mark.parametrize("task", TASKS)
def test_examples_follow_from_the_seed(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    def prompts(seed: int) -> list[str]:
        made = make_examples(tokenizer, task, tokens=400, count=3, seed=seed)
        return [example.prompt for example in made]

    assert prompts(0) == prompts(0)
    assert len({*prompts(0), *prompts(1)}) == 6
    # More examples begin with the same ones.
    more = make_examples(tokenizer, task, tokens=400, count=4, seed=0)
    assert [example.prompt for example in more[:3]] == prompts(0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(TASKS), st.integers(150, 1200), st.integers(0, 1000))
def test_any_length_is_filled_or_one_part_short(task: str, tokens: int, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(RETRIEVAL_MODEL)
    (example,) = make_examples(tokenizer, task, tokens=tokens, count=1, seed=seed)
    assert max(0.98 * tokens, tokens - 12) <= example.tokens + 12
    assert example.tokens <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_the_least_length_is_found_out(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    with pytest.raises(ConfigError, match=f"too few for {task}") as caught:
        make_examples(tokenizer, task, tokens=5, count=2, seed=0)
    least = int(str(caught.value.hint).split()[0])
    made = make_examples(tokenizer, task, tokens=least, count=2, seed=0)
    assert max(example.tokens for example in made) == least
    with pytest.raises(ConfigError, match="too few"):
        make_examples(tokenizer, task, tokens=least - 1, count=2, seed=0)


def test_bad_arguments(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="'needle' is unknown, expected one of passkey"):
        make_examples(tokenizer, "needle", tokens=500, count=1, seed=0)
    with pytest.raises(ConfigError, match="count is 0"):
        make_examples(tokenizer, "passkey", tokens=500, count=0, seed=0)
    with pytest.raises(ConfigError, match="no retrieval task"):
        retrieval_examples(tokenizer, [], tokens=500, count=1, seed=0)
    with pytest.raises(ConfigError, match="longer than the model reads, expected at most its 256"):
        retrieval_examples(tokenizer, ["passkey"], tokens=257, count=1, seed=0, positions=256)


def test_a_tokenizer_that_ends_texts_does_not_end_prompts(tiny_model_dir: Path) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (example,) = make_examples(tokenizer, "passkey", tokens=600, count=1, seed=0)
    assert tokenizer.eos_token_id not in example.prompt_ids
    assert tokenizer.eos_token_id not in example.answer_ids
    assert example.prompt_ids[0] == tokenizer.bos_token_id
