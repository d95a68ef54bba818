from __future__ import annotations

import pytest
import torch

from kvq_evaluation.baselines.hadamard_int import HadamardInt, hadamard
from kvq_evaluation.baselines.int_per_token import IntPerToken
from kvq_formats.errors import UnsupportedModelError


@pytest.mark.parametrize("head_dim", [1, 2, 16, 64, 128])
def test_the_matrix_is_its_own_inverse(head_dim: int) -> None:
    matrix = hadamard(head_dim).double()
    assert torch.equal(matrix, matrix.T)
    # Entries are +-1/sqrt(D) rounded to f32: D products, each off by at most 2**-23 / D.
    assert (matrix @ matrix - torch.eye(head_dim)).abs().max() <= 2.0**-23 * 1.01
    assert (matrix.abs() == matrix.abs()[0, 0]).all()


@pytest.mark.parametrize("head_dim", [0, 12, 80, 96])
def test_other_head_dims_are_refused(head_dim: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"found {head_dim}"):
        hadamard(head_dim)


def test_round_trip_error_is_that_of_the_rotated_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 50, 64, generator=generator)
    codec = HadamardInt(bits=4, layers=[0])
    decoded = codec.decoded_keys(0, keys)
    rotated = keys @ hadamard(64)
    step = (rotated.amax(-1) - rotated.amin(-1)) / 15
    # A rotation keeps lengths: at most half a step in each of 64 directions, fp16 ends included.
    assert ((decoded - keys).norm(dim=-1) <= step / 2 * 8 * 1.02).all()
    assert ((decoded - keys).norm(dim=-1) > 0).all()
    assert torch.equal(decoded, codec.decoded_values(0, keys))


def test_rotation_spreads_an_outlier() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 200, 64, generator=generator)
    keys[..., 5] *= 30
    rotated = HadamardInt(bits=3, layers=[0]).decoded_keys(0, keys)
    plain = IntPerToken(bits=3, layers=[0]).decoded_keys(0, keys)
    # The 63 narrow channels: without the rotation the wide one takes all the codes.
    narrow = torch.arange(64) != 5
    errors = [(x - keys)[..., narrow].square().mean() for x in (rotated, plain)]
    assert errors[0] < errors[1]


def test_tokens_and_heads_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(2, 10, 32, generator=generator)
    codec = HadamardInt(bits=2, layers=[0])
    before = codec.decoded_keys(0, keys)
    changed = keys.clone()
    changed[1, 4] *= 100
    after = codec.decoded_keys(0, changed)
    same = torch.ones(2, 10, dtype=torch.bool)
    same[1, 4] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[1, 4], after[1, 4])


def test_effective_bits() -> None:
    assert HadamardInt(bits=3, layers=[0]).effective_bits(2, 64) == 3.5
    assert HadamardInt(bits=3, layers=[0]).effective_bits(8, 128) == 3.25
    assert HadamardInt(bits=2, layers=[0], sink_tokens=0).effective_bits(2, 64, tokens=100) == 2.5
