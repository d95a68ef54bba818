"""Angles are exact at any position, and rotation is rotation."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.rotary import RotaryAngles, rotate

U = 2.0**-24
"""Unit roundoff of f32."""

TWO_PI = Decimal("6.283185307179586476925286766559005768394338798750211641949889184615632812572418")

positions_to_10m = st.integers(min_value=0, max_value=10_000_000)
scalings = st.sampled_from([1.0, 1.1902380714238083, 1.3465735902799727])


def llama_frequencies(half: int, *, theta: float = 500_000.0) -> Tensor:
    """As a model has them: born in f32."""
    return (theta ** -(torch.arange(half) / half)).float().double()


def exact_cos_sin(position: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """f64, from angles that are reduced in decimals: nothing of it is rounded as in the code."""
    with localcontext() as context:
        context.prec = 60
        turns = [Decimal(position) * Decimal(frequency) for frequency in frequencies.tolist()]
        reduced = [float(turn % TWO_PI) for turn in turns]
    pairs = [(math.cos(angle), math.sin(angle)) for angle in reduced]
    cos, sin = torch.tensor(pairs, dtype=torch.float64).unbind(dim=-1)
    return cos, sin


def largest_error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item()


@settings(deadline=None)
@given(position=positions_to_10m, scaling=scalings)
def test_cos_and_sin_are_rounded_once_at_any_position(position: int, scaling: float) -> None:
    frequencies = llama_frequencies(32)
    angles = RotaryAngles(frequencies, scaling)
    found = angles.cos_sin(torch.tensor([position], dtype=torch.int32))
    for part, exact in zip(found, exact_cos_sin(position, frequencies), strict=True):
        assert part.dtype == torch.float32
        assert part.shape == (1, 32)
        # 1 rounding, and 2**25 * 2**-53 = U / 16 of the angle.
        assert largest_error(part[0], scaling * exact) <= 1.1 * U * scaling


def test_f32_angles_would_not_do() -> None:
    frequencies = llama_frequencies(32)
    position = 9_999_991
    cos, _ = exact_cos_sin(position, frequencies)
    in_f32 = (torch.tensor(position).float() * frequencies.float()).cos()
    assert largest_error(in_f32, cos) > 2.0**-6


def test_positions_keep_their_shape() -> None:
    angles = RotaryAngles(llama_frequencies(4))
    positions = torch.tensor([[3, 1, 4], [1, 5, 9]])
    cos, sin = angles.cos_sin(positions)
    assert cos.shape == sin.shape == (2, 3, 4)
    assert torch.equal(cos[1, 2], angles.cos_sin(torch.tensor(9))[0])


@settings(deadline=None)
@given(base=st.lists(positions_to_10m, min_size=1, max_size=4), scaling=scalings)
def test_pages_are_composed_within_the_bound(base: list[int], scaling: float) -> None:
    frequencies = llama_frequencies(16)
    bases = torch.tensor(base, dtype=torch.int32)
    found = RotaryAngles(frequencies, scaling).page_cos_sin(bases)
    turns = (bases.long()[:, None] + torch.arange(PAGE_TOKENS)).double()[..., None] * frequencies
    for part, exact in zip(found, (turns.cos(), turns.sin()), strict=True):
        assert part.dtype == torch.float32
        assert part.shape == (len(base), PAGE_TOKENS, 16)
        # Two factors, product and sum are rounded; the rest is second order and f64 angles.
        assert largest_error(part, scaling * exact) <= 4.1 * U * scaling


def test_what_a_caller_writes_into_a_page_does_not_stay() -> None:
    angles = RotaryAngles(llama_frequencies(16))
    base = torch.tensor([0, 256], dtype=torch.int32)
    first = [part.clone() for part in angles.page_cos_sin(base)]
    for part in (*angles.page_cos_sin(base), *angles.cos_sin(base)):
        part.fill_(7.0)
    for part, before in zip(angles.page_cos_sin(base), first, strict=True):
        assert torch.equal(part, before)


def rotated_in_f64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    turned = pairs * torch.complex(cos.double(), sin.double())
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], dim=-1)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("half", [8, 6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_is_a_complex_product(half: int, dtype: torch.dtype) -> None:
    x = vectors(3, 2, 20, 16).to(dtype)
    positions = torch.arange(60).view(3, 20) + 9_000_000
    cos, sin = RotaryAngles(llama_frequencies(half), 1.25).cos_sin(positions)
    before = x.clone()
    found = rotate(x, cos[:, None], sin[:, None])
    assert found.dtype == torch.float32
    assert torch.equal(x, before)
    exact = rotated_in_f64(x, cos[:, None], sin[:, None])
    length = x[..., :half].double().hypot(x[..., half : 2 * half].double())
    # Two products and their sum: 2 U of a pair's length.
    bound = torch.zeros_like(exact)
    bound[..., : 2 * half] = (2.001 * U * 1.25 * length).repeat(1, 1, 1, 2)
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert torch.equal(found[..., 2 * half :], x[..., 2 * half :].float())


def test_rotation_in_place_and_into_a_buffer_are_the_same() -> None:
    x = vectors(2, 3, 40, 24)
    cos, sin = RotaryAngles(llama_frequencies(8)).cos_sin(torch.arange(40))
    found = rotate(x, cos, sin)
    buffer = torch.full_like(x, torch.nan)
    assert rotate(x, cos, sin, out=buffer) is buffer
    assert torch.equal(buffer, found)
    assert rotate(x, cos, sin, out=x) is x
    # In place the crossed product is rounded before the sum: one rounding more of a product.
    assert largest_error(x, found.double()) <= 2 * U * found.abs().max().item() * math.sqrt(2)
    half_precision = vectors(40, 24).bfloat16()
    assert rotate(half_precision, cos, sin, out=buffer[0, 0]).dtype == torch.float32
    torch.testing.assert_close(buffer[0, 0], rotate(half_precision, cos, sin))


def test_strided_vectors_are_rotated_too() -> None:
    x = vectors(2, 40, 3, 16).transpose(1, 2)
    cos, sin = RotaryAngles(llama_frequencies(8)).cos_sin(torch.arange(40))
    assert torch.equal(rotate(x, cos, sin), rotate(x.contiguous(), cos, sin))


def test_scores_depend_on_the_distance_alone() -> None:
    angles = RotaryAngles(llama_frequencies(16))
    query, key = vectors(1, 32), vectors(1, 32, seed=1)
    scores = [
        rotate(query, *angles.cos_sin(torch.tensor([start + 17])))
        @ rotate(key, *angles.cos_sin(torch.tensor([start]))).mT
        for start in (0, 1_000_003, 9_999_000)
    ]
    # Either vector is off by (1.1 sqrt(2) + 2) U of its length, the product of 32 terms by 32 U.
    bound = 2 * (2 * 3.6 + 32) * U * query.norm() * key.norm()
    for score in scores[1:]:
        assert (score - scores[0]).abs() <= bound
