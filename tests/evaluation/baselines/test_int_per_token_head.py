from __future__ import annotations

import pytest
import torch

from kvq_evaluation.baselines.hadamard_int import HadamardInt
from kvq_evaluation.baselines.int_per_token_head import IntPerTokenHead
from kvq_formats.errors import ConfigError


def test_a_head_by_hand() -> None:
    # Head 0: zero 0, step 3/3 = 1. Head 1: zero -2, step 12/3 = 4, codes -2, 2, 6, 10.
    values = torch.tensor([[[0.0, 1.2, 1.6, 3.0]], [[-2.0, 0.5, 5.0, 10.0]]])
    decoded = IntPerTokenHead(bits=2, layers=[0]).decoded_values(0, values)
    assert torch.equal(decoded, torch.tensor([[[0.0, 1, 2, 3]], [[-2.0, 2, 6, 10]]]))


def test_groups_of_a_head() -> None:
    # One bit: a group of two decodes to its ends; the whole head to 0 and 9, 4 being nearer 0.
    keys = torch.tensor([[[0.0, 4.0, 0.0, 9.0]]])
    pairs = IntPerTokenHead(bits=1, layers=[0], group=2)
    assert torch.equal(pairs.decoded_keys(0, keys), keys)
    whole = IntPerTokenHead(bits=1, layers=[0])
    assert whole.decoded_keys(0, keys).tolist() == [[[0.0, 0.0, 0.0, 9.0]]]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("head_dim", "group"), [(80, 32), (64, None), (96, 128), (33, 32)])
def test_shape_and_dtype_stay(tokens: int, head_dim: int, group: int | None) -> None:
    x = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(0))
    codec = IntPerTokenHead(bits=4, layers=[0], group=group)
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.isfinite().all()


def test_tokens_and_heads_do_not_meet() -> None:
    keys = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1))
    changed = keys.clone()
    changed[1, 4] *= 100
    codec = IntPerTokenHead(bits=3, layers=[0])
    same = (codec.decoded_keys(0, keys) == codec.decoded_keys(0, changed)).all(-1)
    assert same.sum() == 19
    assert not same[1, 4]


def test_error_falls_with_bits() -> None:
    keys = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(2))
    errors = [
        float((IntPerTokenHead(bits=b, layers=[0]).decoded_keys(0, keys) - keys).square().sum())
        for b in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


def test_effective_bits() -> None:
    assert IntPerTokenHead(bits=4, layers=[0]).effective_bits(8, 128) == 4.25
    assert IntPerTokenHead(bits=3, layers=[0], group=32).effective_bits(2, 64) == 4.0
    # 80 = 32 + 32 + 16: 3 bits and three times 32 bits a head of 80.
    assert IntPerTokenHead(bits=3, layers=[0], group=32).effective_bits(1, 80) == 3 + 96 / 80
    rotated = HadamardInt(bits=4, layers=[0]).effective_bits(8, 128, tokens=50)
    assert IntPerTokenHead(bits=4, layers=[0]).effective_bits(8, 128, tokens=50) == rotated


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 4, "group": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        IntPerTokenHead(layers=[0], **options)
