from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvq_evaluation.baselines.fp8 import Fp8
from kvq_evaluation.samples import LayerSamples


def _samples(keys: Tensor, values: Tensor) -> LayerSamples:
    return LayerSamples(keys=-9 * keys, rotated_keys=keys, values=values, queries=keys)


def test_rounding_by_hand() -> None:
    # In [16, 32) the step of three mantissa bits is 2: 17 is a tie and goes to the even 16, 19 to
    # 20. In [1, 2) it is 1/8. Beyond 448 it saturates. The smallest step is 2**-9; half of it is a
    # tie and goes to zero.
    keys = torch.tensor([[[17.0, 19.0, 18.5, 1.3, -1000.0, 448.0, 2.0**-10, 3 * 2.0**-10]]])
    decoded = Fp8(layers=[0]).decoded_keys(0, keys)
    assert decoded.tolist() == [[[16.0, 20.0, 18.0, 1.25, -448.0, 448.0, 0.0, 2.0**-8]]]


def test_scales_by_hand() -> None:
    # Largest rotated key 800 over 200, largest value 50 over 100.
    keys, values = torch.tensor([[[-800.0, 3.0]]]), torch.tensor([[[50.0, 1.0]]])
    codec = Fp8.calibrated({3: _samples(keys, values)}, sink_tokens=2, recent_tokens=5)
    assert (codec.key_scales, codec.value_scales) == ({3: 4.0}, {3: 0.5})
    assert (list(codec.layers), codec.sink_tokens, codec.recent_tokens) == ([3], 2, 5)
    # 800 / 4 = 200 lies in [128, 256), step 16: 12.5 steps, a tie, to the even 192. 3 / 4 is exact.
    assert codec.decoded_keys(3, keys).tolist() == [[[-768.0, 3.0]]]
    # 50 / 0.5 = 100 in [64, 128), step 8: 12.5 steps, to the even 96, so 48.
    assert codec.decoded_values(3, values).tolist() == [[[48.0, 1.0]]]
    # A layer without scales has 1: 800 saturates.
    assert codec.decoded_keys(0, keys).tolist() == [[[-448.0, 3.0]]]


def test_layers_of_zeros_keep_a_scale_of_one() -> None:
    zeros = torch.zeros(4, 1, 8)
    codec = Fp8.calibrated({0: _samples(zeros, zeros)})
    assert (codec.key_scales, codec.value_scales) == ({0: 1.0}, {0: 1.0})


@pytest.mark.parametrize("exponent", range(-6, 8))
def test_relative_error_is_half_a_step(exponent: int) -> None:
    x = torch.linspace(1, 1.99, 500).reshape(1, 5, 100) * 2.0**exponent
    error = (Fp8(layers=[0]).decoded_values(0, x) - x).abs()
    # Steps are 2**-3 of the power of two below: half of one at most.
    assert error.max() <= 2.0**exponent / 16
    assert error.max() > 2.0**exponent / 17


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_shape_and_dtype_stay(tokens: int) -> None:
    x = torch.randn(2, tokens, 80, generator=torch.Generator().manual_seed(0))
    codec = Fp8(layers=[0])
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)


def test_effective_bits() -> None:
    assert Fp8(layers=[0]).effective_bits(2, 80) == 8
    assert Fp8(layers=[0]).effective_bits(2, 80, tokens=4) == 10
