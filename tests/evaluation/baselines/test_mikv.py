from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvq_evaluation.baselines.mikv import MiKV, by_token, channel_balancer
from kvq_formats.errors import ConfigError, KVQError
from kvq_runtime.evaluation_rule import QueryAwareCodec


def row(tokens: int, head_dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(heads, tokens, head_dim, generator=generator) for heads in (4, 2, 2)
    )
    return queries, keys, values


def test_a_pair_by_hand() -> None:
    # Of two tokens the first gathers most: all of its own query's attention and some of the next.
    queries = torch.tensor([[[0.0, 0, 0, 0], [4, -1, 16, 1]]])
    # The largest magnitude of each key channel is 1: balancers 2, 1, 4, 1.
    keys = torch.tensor([[[0.5, 1, 0.75, 0], [1, 0, 1, -1]]])
    values = torch.tensor([[[0.0, 1, 2, 3], [0, 4, 1, 9]]])
    codec = MiKV(layers=[0], bits=2, low_bits=1, salient_fraction=0.5)
    decoded_keys, decoded_values = codec.decoded_pair(0, queries, keys, values)
    # Token 0: 1, 1, 3, 0 in steps of 1, exact. Token 1: 2, 0, 4, -1, of which one bit makes 4, -1,
    # 4, -1 (3/5 and 1/5 of the way up); divided by 2, 1, 4, 1.
    assert decoded_keys.tolist() == [[[0.5, 1, 0.75, 0], [2, -1, 1, -1]]]
    # Token 1: 4 and 1 of 9 are nearer to 0.
    assert decoded_values.tolist() == [[[0.0, 1, 2, 3], [0, 0, 0, 9]]]


def test_balancer_by_hand() -> None:
    # Two query heads on one: max|q| 9, 4, 0, 5; max|k| 1, 16, 3, 0. The last two have no ratio.
    queries = torch.tensor([[[1.0, -4, 0, 5]], [[-9, 2, 0, 1]]])
    keys = torch.tensor([[[-1.0, 16, 3, 0]]])
    assert channel_balancer(queries, keys).tolist() == [[[3.0, 0.5, 1, 1]]]


def test_a_wide_key_channel_that_queries_hardly_read_costs_less() -> None:
    queries, keys, values = row(128, 64)
    keys[..., 3] *= 100
    queries[..., 3] /= 100
    codec = MiKV(layers=[0], bits=2, low_bits=2)
    balanced, _ = codec.decoded_pair(0, queries, keys, values)
    plain = by_token(keys, 2)
    asked = queries.unflatten(0, (2, 2))

    def error(decoded: Tensor) -> float:
        return float((asked @ (decoded - keys)[:, None].mT).square().mean())

    assert error(balanced) < error(plain)


def test_error_falls_with_bits() -> None:
    queries, keys, values = row(100, 64)
    errors = []
    for bits in (2, 3, 4, 8):
        codec = MiKV(layers=[0], bits=bits, low_bits=2)
        found_keys, found_values = codec.decoded_pair(0, queries, keys, values)
        lost = (found_keys - keys, found_values - values)
        errors.append([float(x.square().sum()) for x in lost])
    for side in zip(*errors, strict=True):
        assert list(side) == sorted(side, reverse=True)


def test_early_tokens_are_important() -> None:
    # Zero queries attend equally: the sum falls with the place, 1 + 1/2 + ... + 1/T down to 1/T.
    _, keys, values = row(10, 64)
    codec = MiKV(layers=[0], bits=8, low_bits=1, salient_fraction=0.3)
    _, decoded = codec.decoded_pair(0, torch.zeros(4, 10, 64), keys, values)
    wide = by_token(values, 8)
    assert torch.equal(decoded[:, :3], wide[:, :3])
    assert torch.equal(decoded[:, 3:], by_token(values, 1)[:, 3:])


@pytest.mark.parametrize("tokens", [0, 1, 2, 19])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_shape_and_dtype_stay(tokens: int, head_dim: int) -> None:
    queries, keys, values = row(tokens, head_dim)
    for decoded in MiKV(layers=[0]).decoded_pair(0, queries, keys, values):
        assert (decoded.shape, decoded.dtype) == (keys.shape, torch.float32)
        assert decoded.isfinite().all()


def test_zeros_stay() -> None:
    queries, keys, values = (torch.zeros_like(x) for x in row(40, 64))
    for decoded in MiKV(layers=[0]).decoded_pair(0, queries, keys, values):
        assert torch.equal(decoded, keys)


def test_effective_bits() -> None:
    # 0.6 * 4 + 0.4 * 2, a bit for 2 * 128 numbers, 32 bits for 128.
    assert MiKV(layers=[0]).effective_bits(8, 128) == pytest.approx(3.2 + 1 / 256 + 0.25)
    # 102 tokens, a sink: int(40.4) = 40 tokens at 2 bits, 61 at 4. 16 bits for 101 keys of a
    # channel and as many values.
    coded = (61 * 4 + 40 * 2) / 101 + 1 / 128 + 0.5 + 16 / 202
    counted = MiKV(layers=[0]).effective_bits(2, 64, tokens=102)
    assert counted == pytest.approx((101 * coded + 16) / 102)
    assert MiKV(layers=[0], recent_tokens=100).effective_bits(2, 64, tokens=101) == 16


def test_it_wants_queries() -> None:
    codec = MiKV(layers=[0])
    assert isinstance(codec, QueryAwareCodec)
    assert codec.rotated_keys
    for alone in (codec.decoded_keys, codec.decoded_values):
        with pytest.raises(KVQError, match="MiKV"):
            alone(0, torch.zeros(1, 2, 4))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError):
        MiKV(layers=[0], low_bits=0)
