from __future__ import annotations

import pytest
import torch

from kvq_evaluation.baselines.normal_float import NormalFloat, codebook
from kvq_formats.errors import ConfigError

# QLoRA, appendix E.
PUBLISHED_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)


def test_four_bits_are_the_published_table() -> None:
    published = torch.tensor([float(x) for x in PUBLISHED_NF4.split()])
    # It was computed from probabilities in f32. One rounded by 2**-25 (they lie in [0.5, 1]) moves
    # a quantile by at most 2**-25 / pdf(1.848) = 2**-25 / 0.0723 = 4.1e-7; the ratio of two such,
    # over 1.848, moves by 4.5e-7. A linspace in f32 may be a second rounding off.
    assert (codebook(4) - published).abs().max() <= 9e-7


def test_two_bits_by_hand() -> None:
    # delta = (1/8 + 1/6)/2 = 0.145833. Positive: probabilities 0.5, 0.677083, 0.854167, quantiles
    # 0, 0.45955, 1.05447 (table of the normal distribution); negative: 0, -1.05447.
    # 0.45955 / 1.05447 = 0.43581.
    assert codebook(2).tolist() == pytest.approx([-1, 0, 0.4358, 1], abs=1e-4)
    # Block 1, scale 8: nearest of -8, 0, 3.486, 8. Block 2, scale 2: of -2, 0, 0.872, 2.
    keys = torch.tensor([[[8.0, 3.0, -3.0, -5.0, 2.0, 1.0, -0.5, 0.4]]])
    decoded = NormalFloat(bits=2, layers=[0], group=4).decoded_keys(0, keys)
    expected = [8, 3.4865, 0, -8, 2, 0.8716, 0, 0]
    assert decoded.flatten().tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_entries_increase_through_an_exact_zero(bits: int) -> None:
    entries = codebook(bits)
    assert len(entries) == 2**bits
    assert (entries.diff() > 0).all()
    assert entries[2 ** (bits - 1) - 1] == 0
    assert (entries[0], entries[-1]) == (-1, 1)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("head_dim", [63, 64, 65, 80, 128])
def test_shape_and_dtype_stay(tokens: int, head_dim: int) -> None:
    x = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(0))
    codec = NormalFloat(bits=3, layers=[0])
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.isfinite().all()


def test_zeros_and_the_largest_are_exact() -> None:
    codec = NormalFloat(bits=2, layers=[0])
    assert torch.equal(codec.decoded_values(0, torch.zeros(1, 2, 64)), torch.zeros(1, 2, 64))
    # A block that is constant is its own largest, here a fp16 number.
    constant = torch.full((1, 2, 64), -0.75)
    assert torch.equal(codec.decoded_values(0, constant), constant)


def test_error_falls_with_bits() -> None:
    keys = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1))
    errors = [
        float((NormalFloat(bits=b, layers=[0]).decoded_keys(0, keys) - keys).square().sum())
        for b in (2, 3, 4, 5)
    ]
    assert errors == sorted(errors, reverse=True)


def test_effective_bits() -> None:
    # 16 bits a block of 64.
    assert NormalFloat(bits=4, layers=[0]).effective_bits(2, 128) == 4.25
    # A head of 80 has two blocks: 32 bits for 80 numbers.
    assert NormalFloat(bits=3, layers=[0]).effective_bits(2, 80) == 3.4
    # One sink of 4 tokens.
    sunk = NormalFloat(bits=4, layers=[0]).effective_bits(2, 128, tokens=4)
    assert sunk == 0.75 * 4.25 + 0.25 * 16


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"bits": 4, "group": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        NormalFloat(layers=[0], **options)
