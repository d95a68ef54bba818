from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_evaluation.baselines import uniform
from kvq_evaluation.baselines.exact import Exact
from kvq_formats.errors import ConfigError

HALF_U = 2.0**-11
"""Unit roundoff of fp16."""


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(1, 8), width=st.floats(0.01, 100))
def test_error_is_half_a_step(seed: int, bits: int, width: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 5, 32, generator=generator) + 1.0) * width
    decoded = uniform.round_trip(x, bits=bits)
    lower, upper = x.amin(-1), x.amax(-1)
    step = (upper - lower) / (2**bits - 1)
    # Half a step, and what fp16 moves the zero and the last entry by: an upper end that moved
    # inwards is clamped to the last code.
    allowed = step / 2 * (1 + HALF_U) + HALF_U * (lower.abs() + (upper - lower)) + 1e-6 * width
    assert ((decoded - x).abs().amax(-1) <= allowed).all()


def test_every_code_is_used_and_no_more() -> None:
    x = torch.linspace(-2, 5, 1000)[None]
    assert len(uniform.round_trip(x, bits=3).unique()) == 8


def test_groups_do_not_meet() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 100.0, 200.0, 300.0]])
    decoded = uniform.round_trip(x, bits=2)
    # A step of 1 and of 100 are fp16 numbers, so four codes hold four numbers exactly.
    assert torch.equal(decoded, x)


def test_a_constant_group_stays() -> None:
    x = torch.full((2, 8), 0.75)
    assert torch.equal(uniform.round_trip(x, bits=2), x)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [64, 128, 512])
def test_bits_are_counted_from_bytes(bits: int, group: int) -> None:
    assert uniform.group_bits(bits=bits, group=group) == bits + 32 / group


def test_an_odd_group_pays_for_its_last_byte() -> None:
    # 3 x 10 bits take 4 bytes, scale and zero 4 more: 64 bits for 10 numbers.
    assert uniform.group_bits(bits=3, group=10) == 6.4


def test_the_last_group_is_shorter() -> None:
    x = torch.tensor([[0.0, 3.0, 0.0, 30.0, 7.0]])
    # Groups of two: [0, 3], [0, 30] and [7] alone. Ends are codes, so all decode exactly.
    pairs = uniform.by_group(x, group=2, quantize=lambda g: uniform.round_trip(g, bits=1))
    assert torch.equal(pairs, x)
    # One group of five, one bit: 0 or 30, whichever is nearer.
    whole = uniform.by_group(x, group=8, quantize=lambda g: uniform.round_trip(g, bits=1))
    assert torch.equal(whole, torch.tensor([[0.0, 0.0, 0.0, 30.0, 0.0]]))


def test_bytes_of_a_shorter_group() -> None:
    # 32 + 32 + 16 numbers of 3 bits: 12 + 12 + 6 bytes of codes, three times 4 bytes beside them.
    assert uniform.allocated_bytes(80, bits=3, group=32) == 42
    assert uniform.allocated_bytes(80, bits=3, group=32, metadata=2) == 36
    assert uniform.allocated_bytes(0, bits=3, group=32) == 0


def test_exact_tokens_weigh_their_share() -> None:
    # A quarter of the tokens at 16 bits, the rest at 4.
    codec = Exact((0,), sink_tokens=5, recent_tokens=20)
    assert uniform.with_exact_tokens(4.0, codec, tokens=100) == 7.0
    assert uniform.with_exact_tokens(4.0, codec, tokens=10) == 16.0
    assert uniform.with_exact_tokens(4.0, codec, tokens=None) == 4.0
    assert [uniform.coded_tokens(codec, tokens) for tokens in (100, 10)] == [75, 1]


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 9}, {"bits": 4, "group": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"is \d; "):
        uniform.check_options(**options)


def test_fewest_bits_can_be_raised() -> None:
    uniform.check_options(bits=2, fewest_bits=2)
    with pytest.raises(ConfigError, match="bits is 1"):
        uniform.check_options(bits=1, fewest_bits=2)
