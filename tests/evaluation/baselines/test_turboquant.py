from __future__ import annotations

import math

import pytest
import torch

from kvq_evaluation.baselines.turboquant import TurboQuant, codebook, random_rotation
from kvq_formats.errors import ConfigError


def test_the_codebook_of_a_sphere_in_three_dimensions_is_uniform() -> None:
    # Archimedes: a coordinate of a random point on the sphere is uniform on [-1, 1].
    assert torch.allclose(codebook(3, 1), torch.tensor([-0.5, 0.5]), atol=1e-6)
    assert torch.allclose(codebook(3, 2), torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=1e-6)


def test_the_codebook_of_many_dimensions_is_that_of_a_gaussian() -> None:
    # Max 1960: 0.4528 and 1.510. A coordinate's excess kurtosis is -6 / (D + 2), which moves a
    # quantile x by a 24th of it times x**3 - 3 x: at most 7e-5 here. The rest is the rounding.
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
    assert torch.allclose(codebook(4096, 2) * 64, expected, atol=6e-4, rtol=0)


def test_the_rotation_is_orthogonal_and_seeded() -> None:
    rotation = random_rotation(80, 3).double()
    # 80 products of f32 entries, rounded to 2**-24 of at most 1 each.
    assert (rotation @ rotation.T - torch.eye(80)).abs().max() < 80 * 2.0**-23
    assert torch.equal(random_rotation(80, 3), random_rotation.__wrapped__(80, 3))
    assert not torch.equal(random_rotation(80, 3), random_rotation(80, 4))


def test_a_vector_by_hand() -> None:
    # 0.36 + 0.4096 + 0.2304 = 1: a direction. Cuts between the entries lie at -0.5, 0, 0.5.
    rotation = random_rotation(3, 0)
    keys = (10 * torch.tensor([0.6, -0.64, 0.48]) @ rotation.T).reshape(1, 1, 3)
    decoded = TurboQuant(bits=2, layers=[0]).decoded_keys(0, keys) @ rotation
    entries = torch.tensor([0.75, -0.75, 0.25])
    assert torch.allclose(decoded, 10 * entries, atol=1e-5)
    # Their length is sqrt(0.5625 + 0.5625 + 0.0625) = sqrt(1.1875).
    corrected = TurboQuant(bits=2, layers=[0], norm_correction=True).decoded_keys(0, keys)
    assert torch.allclose(corrected @ rotation, 10 / 1.1875**0.5 * entries, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_lies_between_the_papers_bounds(bits: int) -> None:
    # Theorem 1: at most sqrt(3) pi / 2 * 4**-b; theorem 3: no quantizer stays below 4**-b.
    keys = torch.randn(2, 500, 128, generator=torch.Generator().manual_seed(bits))
    decoded = TurboQuant(bits=bits, layers=[0]).decoded_keys(0, keys)
    distortion = ((decoded - keys).square().sum(-1) / keys.square().sum(-1)).mean()
    assert 4.0**-bits < distortion < math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_norm_correction_keeps_lengths() -> None:
    values = 5 * torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    codec = TurboQuant(bits=2, layers=[0], norm_correction=True)
    lengths = codec.decoded_values(0, values).norm(dim=-1)
    # fp16's unit roundoff, and f32 sums.
    assert torch.allclose(lengths, values.norm(dim=-1), rtol=2.0**-11 * 1.01)


def test_tokens_and_heads_do_not_meet() -> None:
    keys = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(2))
    codec = TurboQuant(bits=2, layers=[0])
    before = codec.decoded_keys(0, keys)
    changed = keys.clone()
    changed[1, 4] *= -3
    after = codec.decoded_keys(0, changed)
    same = torch.ones(2, 10, dtype=torch.bool)
    same[1, 4] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[1, 4], after[1, 4])


@pytest.mark.parametrize("head_dim", [64, 80, 96])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_shapes(head_dim: int, tokens: int) -> None:
    keys = torch.ones(2, tokens, head_dim)
    for norm_correction in (False, True):
        codec = TurboQuant(bits=3, layers=[0], norm_correction=norm_correction)
        decoded = codec.decoded_keys(0, keys)
        assert decoded.shape == keys.shape
        assert decoded.dtype == torch.float32
        assert codec.decoded_values(0, torch.zeros_like(keys)).eq(0).all()


def test_effective_bits() -> None:
    # 3 x 128 bits are 48 bytes, the norm 2: 400 bits for 128 numbers. 3 x 80: 30 + 2 bytes.
    codec = TurboQuant(bits=3, layers=[0])
    assert codec.effective_bits(8, 128) == 3.125
    assert codec.effective_bits(2, 80) == 3.2
    assert codec.effective_bits(8, 128, tokens=100) == pytest.approx(0.99 * 3.125 + 0.16)


@pytest.mark.parametrize("bits", [0, 9])
def test_bad_options(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"bits is {bits}"):
        TurboQuant(bits=bits, layers=[0])
