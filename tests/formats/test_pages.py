"""Pages against a dense-and-sparse split written as plain loops, and their edges."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats import outliers, pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import KeyParameters, ValueParameters

LENGTHS = [0, 1, 255, 256, 257, 600]


def codebook(bits: int) -> Codebook:
    grid = torch.linspace(-1, 1, 1 << bits)
    return Codebook.fit_grid(0.95 * grid.sign() * grid.abs() ** 1.3)


def key_parameters(bits: int, H: int, D: int, *, step: float = 1 / 64) -> KeyParameters:
    generator = torch.Generator().manual_seed(7)
    return KeyParameters(
        center=torch.randn(H, D, generator=generator),
        half_range=torch.rand(H, D, generator=generator) + 0.5,
        codebook=codebook(bits),
        outlier_step=step,
    )


def heavy(H: int, T: int, D: int, *, seed: int = 0) -> Tensor:
    """Keys or values with a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(H, T, D, generator=generator) / 2
    return x * torch.where(torch.rand(H, T, D, generator=generator) < 0.02, 6.0, 1.0)


def dense_keys(x: Tensor, p: KeyParameters) -> Tensor:
    """What codes alone decode to."""
    z = (x - p.center[:, None]) / p.half_range[:, None]
    return p.codebook.decode(p.codebook.encode(z)) * p.half_range[:, None] + p.center[:, None]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("bits", "D"), [(2, 16), (3, 64), (4, 80)])
def test_keys_are_codes_plus_the_largest_residuals(bits: int, D: int, tokens: int) -> None:
    H = 2
    config = KVQConfig(key_bits=bits, value_bits=bits)
    p = key_parameters(bits, H, D)
    x = heavy(H, tokens, D)
    packed = pages.encode_keys(x, p, config, first_position=5)
    decoded = pages.decode_keys(packed, p, tokens=tokens)
    assert decoded.shape == x.shape

    dense = dense_keys(x, p)
    capacity = outliers.key_pool_capacity(config, D)
    low, high = outliers.residual_limits(outliers.channel_bits(D))
    expected = dense.clone()
    for start in range(0, tokens, 256):
        page = slice(start, min(start + 256, tokens))
        room = math.ceil(capacity * (page.stop - page.start) / 256)
        for head in range(H):
            z = (x[head, page] - p.center[head]) / p.half_range[head]
            residual = x[head, page] - dense[head, page]
            found = [
                (-abs(float(residual[t, c])), t, c) for t, c in (z.abs() > 1).nonzero().tolist()
            ]
            for _, t, c in sorted(found)[:room]:
                unit = float(p.half_range[head, c]) * p.outlier_step
                steps = min(max(round(float(residual[t, c]) / unit), low), high)
                expected[head, start + t, c] += steps * unit
    # The loop rounds residuals of x, the codec those of z: a tie may fall to the other side, one
    # step of the widest channel apart.
    unit = float(p.half_range.max()) * p.outlier_step
    assert ((decoded - expected).abs() <= unit * 1.001).all()
    close = torch.isclose(decoded, expected, atol=1e-5, rtol=1e-5)
    assert (~close).sum() <= 1 + decoded.numel() // 10_000
    assert packed.base_positions.tolist() == list(range(5, 5 + tokens, 256))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("grain", ["token", "head"])
def test_values_are_codes_plus_both_tails_of_a_token(grain: str, tokens: int) -> None:
    H, D, bits = 2, 64, 3
    config = KVQConfig(value_bits=bits, value_grain=grain, value_capacity_factor=4)
    p = ValueParameters(codebook=codebook(bits), outlier_step=1 / 16)
    x = heavy(H, tokens, D)
    packed = pages.encode_values(x, p, config)
    decoded = pages.decode_values(packed, p, tokens=tokens)
    assert decoded.shape == x.shape
    assert packed.scales.shape[1] == (1 if grain == "token" else H)
    n = outliers.value_outliers_per_side(config, H, D)
    vectors = x.transpose(0, 1).flatten(1) if grain == "token" else x.flatten(0, 1)
    for vector, restored in zip(
        vectors,
        decoded.transpose(0, 1).flatten(1) if grain == "token" else decoded.flatten(0, 1),
        strict=True,
    ):
        order = vector.argsort()
        inside = order[n : len(order) - n]
        lower, upper = vector[inside].min(), vector[inside].max()
        half, center = ((upper - lower) / 2).half().float(), ((upper + lower) / 2).half().float()
        gap = p.codebook.entries.diff().max()
        # Inliers: half a gap, half a grid step, and fp16 rounding of half-range and centre.
        rounding = 2**-11 * (half + center.abs()) * 2
        end_gap = 1 - p.codebook.entries[-1]
        bound = half * (torch.maximum(gap / 2, end_gap) + p.codebook.step) + rounding
        assert (vector - restored)[inside].abs().max() <= bound
        # Outliers: half a step of the residual, unless it saturates.
        outside = torch.cat([order[:n], order[len(order) - n :]])
        residual = (vector - center) / half
        reach = 127 * p.outlier_step + float(p.codebook.decode_entries[-1])
        kept = outside[residual[outside].abs() < reach]
        bound = half * p.outlier_step / 2 + 1e-5 * half
        assert ((vector - restored)[kept].abs() <= bound).all()


def test_full_list_keeps_the_largest_and_clamps_the_rest() -> None:
    H, D = 1, 16
    config = KVQConfig(key_bits=3, outlier_fraction=0.01, outlier_capacity=0.002)
    p = key_parameters(3, H, D)
    sizes = torch.linspace(1.1, 5.0, 256 * D).reshape(256, D)[torch.randperm(256)]
    x = p.center[:, None] + p.half_range[:, None] * sizes
    packed = pages.encode_keys(x, p, config)
    capacity = outliers.key_pool_capacity(config, D)
    assert capacity < 256 * D
    assert int(packed.outlier_counts.sum()) == capacity
    residual = (x - dense_keys(x, p)).abs()[0]
    decoded = pages.decode_keys(packed, p, tokens=256)[0]
    corrected = (decoded - dense_keys(x, p)[0]).abs() > 0
    worst_left = residual[~corrected].max()
    assert residual[corrected].min() >= worst_left


def test_a_page_depends_on_its_own_tokens_alone() -> None:
    config = KVQConfig(key_bits=3, value_bits=3)
    p, v = key_parameters(3, 2, 16), ValueParameters(codebook(3), 1 / 16)
    x = heavy(2, 700, 16)
    for first, last in ((0, 512), (256, 512)):
        part = x[:, first:last]
        whole_keys, part_keys = pages.encode_keys(x, p, config), pages.encode_keys(part, p, config)
        whole_values, part_values = (pages.encode_values(t, v, config) for t in (x, part))
        page = slice(first // 256, last // 256)
        assert torch.equal(whole_keys.words[page], part_keys.words)
        assert torch.equal(whole_keys.outliers[page], part_keys.outliers)
        assert torch.equal(whole_values.words[page], part_values.words)
        assert torch.equal(whole_values.outliers[page], part_values.outliers)
        assert torch.equal(
            whole_values.outlier_offsets[page].int(), part_values.outlier_offsets.int()
        )


def test_no_outliers_take_no_bytes() -> None:
    config = KVQConfig(outlier_fraction=0.0)
    packed = pages.encode_keys(heavy(2, 300, 16), key_parameters(4, 2, 16), config)
    values = pages.encode_values(heavy(2, 300, 16), ValueParameters(codebook(4), 1 / 16), config)
    for sizes in (pages.allocated_bytes(packed), pages.allocated_bytes(values)):
        assert all(size == 0 for name, size in sizes.items() if name.startswith("outlier"))


def test_entries_are_sorted_and_counted() -> None:
    H, T, D = 2, 256, 64
    config = KVQConfig(key_bits=2, value_bits=2)
    keys = pages.encode_keys(heavy(H, T, D), key_parameters(2, H, D), config)
    values = pages.encode_values(heavy(H, T, D), ValueParameters(codebook(2), 1 / 16), config)
    for head in range(H):
        counts = keys.outlier_counts[0, head].tolist()
        _, channel = outliers.unpack_entries(keys.outliers[0, head], bits=6)
        place = 0
        for count in counts:
            run = channel[place : place + count].tolist()
            assert run == sorted(set(run))
            place += count
        assert (keys.outliers[0, head, place:] == 0).all()
        offsets = values.outlier_offsets[0, head].int().tolist()
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        _, token = outliers.unpack_entries(values.outliers[0, head], bits=8)
        for begin, end in pairwise(offsets):
            run = token[begin:end].tolist()
            assert run == sorted(set(run))


def test_one_token_full_of_outliers_fits_its_count_byte() -> None:
    config = KVQConfig(key_bits=4, outlier_capacity=0.02)
    p = key_parameters(4, 1, 256, step=1 / 16)
    x = p.center[:, None].expand(1, 256, 256).clone()
    x[0, 3] += 4 * p.half_range[0]
    packed = pages.encode_keys(x, p, config)
    assert packed.outlier_counts[0, 0, 3] == 255
    error = (pages.decode_keys(packed, p, tokens=256) - x)[0, 3].abs() / p.half_range[0]
    assert (error > 1).sum() == 1


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 520),
    scale=st.sampled_from([0.0, 1e-7, 1.0, 1e4, 1e8]),
    constant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_values_decode_to_finite_numbers(
    tokens: int, scale: float, constant: bool, seed: int
) -> None:
    config = KVQConfig(value_bits=2, key_bits=2)
    x = heavy(2, tokens, 16, seed=seed) * scale
    if constant:
        x = torch.full_like(x, scale)
    values = pages.encode_values(x, ValueParameters(codebook(2), 1 / 16), config)
    assert torch.isfinite(
        pages.decode_values(values, ValueParameters(codebook(2), 1 / 16), tokens=tokens)
    ).all()
    p = key_parameters(2, 2, 16)
    assert torch.isfinite(
        pages.decode_keys(pages.encode_keys(x, p, config), p, tokens=tokens)
    ).all()
