"""Baselines by the names that people give on the command line."""

from __future__ import annotations

import pytest
import torch

from kvq_evaluation.baselines.named import BaselineName, method_summaries
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError
from kvq_runtime.evaluation_rule import QueryAwareCodec

H, D, T = 2, 64, 96


def samples() -> dict[int, LayerSamples]:
    generator = torch.Generator().manual_seed(0)

    def some(heads: int) -> torch.Tensor:
        return torch.randn(T, heads, D, generator=generator)

    squares = [some(H).square() for _ in range(2)]
    return {i: LayerSamples(some(H), some(H), some(H), some(4), *squares) for i in (0, 1)}


def method_widths(method: str) -> bool:
    """Whether a method's name goes on with its bits."""
    try:
        BaselineName.parse(method)
    except ConfigError:
        return True
    return False


def unasked() -> dict[int, LayerSamples]:
    raise AssertionError("samples were taken for a method that needs none")


@pytest.mark.parametrize("method", method_summaries())
def test_every_method_makes_a_codec(method: str) -> None:
    name = f"{method}4" if method_widths(method) else method
    parsed = BaselineName.parse(name)
    codec = parsed.make(
        layers=(0, 1),
        samples=samples if parsed.method.calibrated else unasked,
        sink_tokens=1,
    )
    assert set(codec.layers) == {0, 1}
    assert codec.sink_tokens == 1
    keys = torch.randn(H, 40, D, generator=torch.Generator().manual_seed(1))
    if isinstance(codec, QueryAwareCodec):
        decoded = codec.decoded_pair(0, torch.cat([keys, keys]), keys, keys)
    else:
        decoded = codec.decoded_keys(0, keys), codec.decoded_values(1, keys)
    assert [x.shape for x in decoded] == [keys.shape] * 2
    # Codes of 1.5 to 8 bits and what goes with them: KVQuant's code keeps a codebook a token.
    assert 1.5 < codec.effective_bits(H, D, tokens=4096) < 9


@pytest.mark.parametrize("method", method_summaries())
def test_recent_tokens_are_charged(method: str) -> None:
    """As sinks are: a window of 100 more tokens costs 16 bits for each of its numbers."""
    parsed = BaselineName.parse(f"{method}4" if method_widths(method) else method)
    given = samples if parsed.method.calibrated else unasked

    def bits(*, tokens: int, sink_tokens: int, recent_tokens: int) -> float:
        codec = parsed.make(
            layers=(0, 1), samples=given, sink_tokens=sink_tokens, recent_tokens=recent_tokens
        )
        return codec.effective_bits(H, D, tokens=tokens)

    coded = bits(tokens=4000, sink_tokens=0, recent_tokens=0)
    charged = bits(tokens=4101, sink_tokens=1, recent_tokens=100)
    assert charged == pytest.approx((4000 * coded + 101 * 16) / 4101)
    assert bits(tokens=101, sink_tokens=1, recent_tokens=200) == 16


def test_bits_and_groups_arrive() -> None:
    codec = BaselineName.parse("kivi2-g16").make(layers=(0,), samples=unasked, sink_tokens=3)
    # 2 + 32 / 16, and 3 of 4,099 tokens at 16 bits.
    assert codec.effective_bits(H, D, tokens=4099) == pytest.approx((4 * 4096 + 3 * 16) / 4099)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kivy2", "Did you mean kivi"),
        ("kivi", "names no width"),
        ("kivi7", "names no width"),
        ("fp8-g64", "does not take"),
        ("kivi2-g0", "does not take"),
        ("kivi2-gx", "no baseline"),
        ("", "no baseline"),
    ],
)
def test_names_that_are_none(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BaselineName.parse(name)
