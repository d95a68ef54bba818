"""Scores of answers, against models whose logits are made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.retrieval.examples import RetrievalExample
from kvq_evaluation.retrieval.rows import retrieval_rows
from kvq_evaluation.retrieval.scoring import ExampleScore, score_examples
from kvq_formats.errors import CalibrationError, ConfigError, DataError

VOCABULARY = 320


def example(
    prompt: list[int], answer: list[int], *, item_tokens: tuple[int, ...], task: str = "passkey"
) -> RetrievalExample:
    return RetrievalExample(
        task=task,
        prompt_ids=torch.tensor(prompt),
        answer_ids=torch.tensor(answer),
        item_tokens=item_tokens,
        prompt="",
        items=("",) * len(item_tokens),
    )


@contextmanager
def answering(model: LlamaForCausalLM, follows: dict[int, int], height: float) -> Iterator[None]:
    """Inside, a token of ``follows`` predicts what follows it, with a logit of ``height``."""

    def replaced(_module: object, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> None:
        ids.append(kwargs["input_ids"])

    def predicted(_module: object, _args: object, output: Tensor) -> Tensor:
        logits = torch.zeros_like(output)
        for row, token in enumerate(ids[-1][0, -output.shape[1] :].tolist()):
            if token in follows:
                logits[0, row, follows[token]] = height
        return logits

    ids: list[Tensor] = []
    hooks = [
        model.register_forward_pre_hook(replaced, with_kwargs=True),
        model.lm_head.register_forward_hook(predicted),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def variant(
    model: LlamaForCausalLM, follows: dict[int, int], height: float = 9.0
) -> Callable[[], AbstractContextManager[None]]:
    return lambda: answering(model, follows, height)


@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_an_item_counts_if_all_of_its_tokens_are_right(
    tiny_llama: LlamaForCausalLM, path: str
) -> None:
    # Three items of 1, 2 and 2 tokens behind a prompt that ends in 5.
    asked = example([0, 3, 4, 5], [10, 20, 21, 30, 31], item_tokens=(1, 2, 2))
    right = {5: 10, 10: 20, 20: 21, 21: 30, 30: 31}
    scores = score_examples(
        tiny_llama,
        [asked],
        variants={
            "right": variant(tiny_llama, right),
            "one token wrong": variant(tiny_llama, right | {20: 99}),
            "another wrong": variant(tiny_llama, right | {21: 99, 30: 99}),
            "silent": variant(tiny_llama, {}),
        },
        path=path,
    )
    assert next(iter(scores)) == UNQUANTIZED
    found = {name: one[0].accuracy for name, one in scores.items()}
    assert found["right"] == 1
    assert found["one token wrong"] == found["another wrong"] == pytest.approx(2 / 3)
    assert found["silent"] == 0
    right_nll = math.log(math.exp(9) + VOCABULARY - 1) - 9
    wrong_nll = right_nll + 9
    # Sums of five logarithms in f32.
    assert scores["right"][0].nll == pytest.approx(5 * right_nll, abs=1e-4)
    assert scores["one token wrong"][0].nll == pytest.approx(4 * right_nll + wrong_nll, abs=1e-4)
    assert scores["silent"][0].nll == pytest.approx(5 * math.log(VOCABULARY), abs=1e-4)


def test_both_paths_agree_where_nothing_is_quantized(tiny_llama: LlamaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (4, 60), generator=generator).tolist()
    examples = [example(row[:-4], row[-4:], item_tokens=(2, 2)) for row in ids]
    scores = score_examples(
        tiny_llama,
        examples,
        variants={"prefill": nullcontext, "decode": nullcontext},
        path={"prefill": "prefill", "decode": "decode"},
    )
    assert scores["prefill"] == scores[UNQUANTIZED]
    for one, other in zip(scores["decode"], scores["prefill"], strict=True):
        assert one.accuracy == other.accuracy
        # Other orders of summation, f32.
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


def test_logits_that_are_not_finite_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    asked = example([0, 5], [10], item_tokens=(1,), task="multi_key")
    broken = {"q": variant(tiny_llama, {5: 10}, math.nan)}
    with pytest.raises(CalibrationError, match=r"q gave NaN .* example of multi_key"):
        score_examples(tiny_llama, [asked], variants=broken)


def test_bad_arguments(tiny_llama: LlamaForCausalLM) -> None:
    asked = [example([0, 5], [10], item_tokens=(1,))]
    with pytest.raises(DataError, match="no retrieval example"):
        score_examples(tiny_llama, [], variants={})
    with pytest.raises(ConfigError, match="path is 'generate'"):
        score_examples(tiny_llama, asked, variants={}, path="generate")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="named 'unquantized'"):
        score_examples(tiny_llama, asked, variants={UNQUANTIZED: nullcontext})


def test_the_model_is_in_its_mode_again(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    score_examples(tiny_llama, [example([0, 5], [10], item_tokens=(1,))], variants={})
    assert tiny_llama.training


def test_rows_are_means_over_examples() -> None:
    examples = [
        example([0] * 7, [1, 2], item_tokens=(1, 1), task="common_words"),
        example([0] * 9, [1], item_tokens=(1,)),
        example([0] * 8, [1], item_tokens=(1,)),
        example([0] * 9, [1], item_tokens=(1,)),
    ]
    plain = [ExampleScore(1.0, 0.5), *[ExampleScore(1.0, 0.25)] * 3]
    coarse = [ExampleScore(0.5, 3.0), ExampleScore(0.0, 1.0), *[ExampleScore(1.0, 0.25)] * 2]
    rows = retrieval_rows(
        examples,
        {UNQUANTIZED: plain, "q (decode)": coarse},
        {UNQUANTIZED: (UNQUANTIZED, "prefill"), "q (decode)": ("q", "decode")},
        {UNQUANTIZED: 32.0, "q": 2.5},
    )
    assert [(row.task, row.name, row.path) for row in rows] == [
        ("common_words", UNQUANTIZED, "prefill"),
        ("common_words", "q", "decode"),
        ("passkey", UNQUANTIZED, "prefill"),
        ("passkey", "q", "decode"),
    ]
    words, keys = rows[1], rows[3]
    assert (words.accuracy, words.accuracy_stderr, words.difference) == (0.5, None, -0.5)
    # Two tokens: nats a token.
    assert words.nll == 1.5
    assert (keys.examples, keys.tokens, keys.effective_bits) == (3, 10, 2.5)
    assert keys.accuracy == pytest.approx(2 / 3)
    # Variance of (0, 1, 1) over n - 1 is 1/3; its mean's error is the root of 1/9.
    assert keys.accuracy_stderr == pytest.approx(1 / 3)
    assert keys.difference == pytest.approx(-1 / 3)
    assert rows[0].difference is rows[0].difference_stderr is None
    assert words.to_json()["accuracy_stderr"] is None
