from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvq_evaluation.baselines.zipcache import (
    ZipCache,
    channelwise,
    normalized_attention,
    probes,
    tokenwise,
)
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
    # Two tokens; the last one is the only probe. Its query prefers itself: token 1 is salient. A
    # class has one token, so that keys, quantized a channel, are constant groups and exact.
    keys = torch.tensor([[[0.0, 5, 6, 7], [2, 8, 9, 10]]])
    queries = torch.tensor([[[0.0, 0, 0, 0], [1, 0, 0, 0]]])
    # Channels of values are divided by the roots of 16, 1, 4 and 9.
    values = torch.tensor([[[8.0, 0, 2, 9], [16, 1, 4, 9]]])
    codec = ZipCache(layers=[0], bits=2, low_bits=1, salient_fraction=0.5)
    decoded_keys, decoded = codec.decoded_pair(0, queries, keys, values)
    assert torch.equal(decoded_keys, keys)
    # Token 1: 4, 1, 2, 3 in steps of 1, exact. Token 0: 2, 0, 1, 3, of which one bit makes 3, 0, 0,
    # 3; times 4, 1, 2, 3.
    assert decoded.tolist() == [[[12.0, 0, 0, 9], [16, 1, 4, 9]]]
    # The query prefers token 0. Token 0: 2, 0, 1, 3, exact. Token 1: 4, 1, 2, 3 -> 4, 1, 1, 4.
    _, decoded = codec.decoded_pair(0, -queries, keys, values)
    assert decoded.tolist() == [[[8.0, 0, 2, 9], [16, 1, 2, 12]]]


def test_keys_by_channel_values_by_row() -> None:
    # One bit. A channel of three tokens: 0, 1, 4 -> 0, 0, 4.
    assert channelwise(torch.tensor([[[0.0], [1], [4]]]), 1).flatten().tolist() == [0, 0, 4]
    # A row of two heads: 0, 1 | 1, 4 -> 0, 0 | 0, 4.
    assert tokenwise(torch.tensor([[[0.0, 1]], [[1, 4]]]), 1).tolist() == [[[0, 0]], [[0, 4]]]


def test_attention_is_normalized_by_the_probes_that_see_a_token() -> None:
    # All queries are zero: each attends equally to what it sees. Token 0 is seen by query 0 (1) and
    # query 2 (1/3): 4/3 of 2; tokens 1 and 2 by query 2 alone.
    found = normalized_attention(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([0, 2]))
    expected = torch.tensor([[2 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(found, expected, rtol=0, atol=4 * 2**-24)


def test_probes() -> None:
    # int(100 - 5) = 95: tokens 95 to 99, and int(5) at random before them.
    places = probes(100, 0)
    assert places[:5].tolist() == [95, 96, 97, 98, 99]
    assert len(places) == 10
    assert int(places[5:].max()) < 95
    assert torch.equal(places, probes(100, 0))
    assert not torch.equal(places, probes(100, 1))


def test_salient_tokens_are_closer() -> None:
    queries, keys, values = row(200, 64)
    # Every tenth token draws all queries, of all heads.
    queries[..., 0] = 6.0
    keys[:, ::10, 0] = 20.0
    wanted = torch.zeros(200, dtype=torch.bool)
    wanted[::10] = True
    codec = ZipCache(layers=[0], salient_fraction=0.1)
    _, decoded = codec.decoded_pair(0, queries, keys, values)
    error = (decoded - values).square().mean(dim=(0, 2))
    # Each of 4 bits' steps is a fifth of 2 bits' (3 steps against 15), so the square a 25th.
    assert float(error[wanted].max()) < float(error[~wanted].min())


def test_error_falls_with_bits() -> None:
    queries, keys, values = row(100, 64)
    errors = []
    for bits in (2, 3, 4, 8):
        codec = ZipCache(layers=[0], bits=bits, low_bits=2)
        found_keys, found_values = codec.decoded_pair(0, queries, keys, values)
        lost = (found_keys - keys, found_values - values)
        errors.append([float(x.square().sum()) for x in lost])
    for side in zip(*errors, strict=True):
        assert list(side) == sorted(side, reverse=True)


@pytest.mark.parametrize("tokens", [0, 1, 2, 19, 20, 21])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_shape_and_dtype_stay(tokens: int, head_dim: int) -> None:
    queries, keys, values = row(tokens, head_dim)
    for decoded in ZipCache(layers=[0]).decoded_pair(0, queries, keys, values):
        assert (decoded.shape, decoded.dtype) == (keys.shape, torch.float32)
        assert decoded.isfinite().all()


def test_zeros_stay() -> None:
    queries, keys, values = (torch.zeros_like(x) for x in row(40, 64))
    for decoded in ZipCache(layers=[0]).decoded_pair(0, queries, keys, values):
        assert torch.equal(decoded, keys)


def test_effective_bits() -> None:
    # 0.6 * 4 + 0.4 * 2; a bit for 2 * 128 numbers; 32 bits a row of 1024 values, half the numbers.
    counted = ZipCache(layers=[0]).effective_bits(8, 128)
    assert counted == pytest.approx(3.2 + 1 / 256 + 32 / 1024 / 2)
    # 102 tokens, a sink: int(40.4) = 40 tokens at 2 bits, 61 at 4. A key channel has 32 bits in
    # both classes, a value channel 16.
    coded = (61 * 4 + 40 * 2) / 101 + 1 / 128 + 32 / 128 / 2 + (64 + 16) / 101 / 2
    counted = ZipCache(layers=[0]).effective_bits(2, 64, tokens=102)
    assert counted == pytest.approx((101 * coded + 16) / 102)
    assert ZipCache(layers=[0], recent_tokens=100).effective_bits(2, 64, tokens=101) == 16


def test_it_wants_queries() -> None:
    codec = ZipCache(layers=[0])
    assert isinstance(codec, QueryAwareCodec)
    assert codec.rotated_keys
    for alone in (codec.decoded_keys, codec.decoded_values):
        with pytest.raises(KVQError, match="ZipCache"):
            alone(0, torch.zeros(1, 2, 4))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError):
        ZipCache(layers=[0], salient_fraction=1.5)
