from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvq_evaluation.baselines.saliency import (
    attention_mass,
    by_class,
    check_options,
    class_sizes,
    code_bits,
    salient_tokens,
)
from kvq_formats.errors import ConfigError


def test_attention_by_hand() -> None:
    # One key/value head of two query heads, D = 1. The first token sees itself alone. The second
    # query of head 0 has scores 0 and ln 3, weights 1/4 and 3/4; of head 1, 1/2 and 1/2.
    keys = torch.tensor([[[0.0], [math.log(3)]]])
    queries = torch.tensor([[[7.0], [1.0]], [[7.0], [0.0]]])
    both = attention_mass(queries, keys, torch.tensor([0, 1]))
    # Means over query heads: (1, 0) and (3/8, 5/8). f32 rounds each of a handful of steps.
    assert torch.allclose(both, torch.tensor([[1.375, 0.625]]), rtol=0, atol=8 * 2**-24)
    last = attention_mass(queries, keys, torch.tensor([1]))
    assert torch.allclose(last, torch.tensor([[0.375, 0.625]]), rtol=0, atol=8 * 2**-24)


def test_attention_is_that_of_torch() -> None:
    # 300 queries are more than a block; four query heads on two key/value heads.
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 300, 16, generator=generator)
    keys = torch.randn(2, 300, 16, generator=generator)
    # Attention over unit values gives the weights themselves.
    weights = torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(2, dim=0),
        torch.eye(300).expand(4, 300, 300),
        is_causal=True,
    )
    expected = weights.unflatten(0, (2, 2)).mean(dim=1).sum(dim=1)
    found = attention_mass(queries, keys, torch.arange(300))
    # Sums of 300 weights at most 1, each within a few f32 roundings.
    assert torch.allclose(found, expected, rtol=0, atol=300 * 8 * 2**-24)


def test_salient_tokens() -> None:
    score = torch.tensor([[1.0, 5.0, 3.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
    # int(0.5 * 4) = 2 are not; of equal ones the first is.
    assert salient_tokens(score, 0.5).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]
    assert salient_tokens(score, 1.0).all()
    assert not salient_tokens(score, 0.0).any()
    # int(0.4 * 7) = 2.
    assert class_sizes(7, 0.6) == (5, 2)


def test_classes_come_back_in_their_places() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    salient = torch.tensor([[True, False, True], [False, True, True]])
    seen: list[tuple[int, list[int]]] = []

    def quantize(members: Tensor, width: int) -> Tensor:
        seen.append((width, list(members.shape)))
        return members + 100 * width

    decoded = by_class(x, salient, quantize, bits=[4, 2])
    assert seen == [(4, [2, 2, 2]), (2, [2, 1, 2])]
    added = torch.tensor([[400.0, 200, 400], [200, 400, 400]])[..., None]
    assert torch.equal(decoded, x + added)


def test_code_bits() -> None:
    # 4 * 0.25 + 2 * 0.75 = 2.5, and one bit for the 2 * 64 numbers of a token's head.
    assert code_bits([4, 2], 0.25, 64, tokens=None) == 2.5 + 1 / 128
    # Three tokens: int(0.75 * 3) = 2 are not salient, (4 + 2 * 2) / 3.
    assert code_bits([4, 2], 0.25, 64, tokens=3) == pytest.approx(8 / 3 + 1 / 128)


@pytest.mark.parametrize("options", [(0, 2, 0.5), (4, 9, 0.5), (4, 2, -0.1), (4, 2, 1.1)])
def test_bad_options_are_refused(options: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError):
        check_options(*options)
