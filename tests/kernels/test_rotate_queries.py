"""Rotated queries of a decode step against the reference rotation."""

from __future__ import annotations

import math

import pytest
import torch

from kvq_kernels.phases import COS_SIN_ERROR, Phases
from kvq_kernels.rotary import RotaryAngles, rotate
from kvq_kernels.rotate_queries import rotate_queries

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize(
    ("D", "rotary_dim", "dtype", "scaling"),
    [
        (128, 128, torch.bfloat16, 1.0),
        (80, 20, torch.float16, 1.0),
        (64, 64, torch.float32, 1.25),
        (16, 4, torch.float32, 1.0),
    ],
)
@pytest.mark.parametrize("B", [0, 1, 3])
def test_queries_are_rotated(
    B: int, D: int, rotary_dim: int, dtype: torch.dtype, scaling: float, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    frequencies = 500_000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / rotary_dim)
    angles = RotaryAngles(frequencies, scaling)
    # As a model has them: heads of a token side by side.
    query = torch.randn(B, 1, 5, D, generator=generator).to(dtype).transpose(1, 2)[:, :, 0]
    positions = torch.tensor([0, 1_000_003, 77], dtype=torch.int32)[:B]
    phases = Phases.of(angles, device=device)
    found = rotate_queries(query.to(device), positions.to(device), phases).cpu()
    assert found.dtype == dtype
    assert found.is_contiguous()
    turn = positions.double()[:, None] * frequencies
    cos, sin = (turn.cos() * scaling)[:, None], (turn.sin() * scaling)[:, None]
    half = rotary_dim // 2
    x = query.double()
    first, second = x[..., :half], x[..., half:rotary_dim]
    expected = torch.cat(
        [first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]], dim=-1
    )
    # Both members of a pair, with the error of cosine and sine, three roundings, and the last one.
    reach = scaling * (first.abs() + second.abs()) if half else first
    bound = (COS_SIN_ERROR + 3 * 2.0**-24 + ROUNDING[dtype]) * torch.cat([reach, reach], dim=-1)
    error = (found.double() - expected).abs()
    assert (error[..., :rotary_dim] <= bound).all()
    assert torch.equal(found[..., rotary_dim:], query[..., rotary_dim:])


def test_it_is_the_rotation_of_the_reference(device: torch.device) -> None:
    angles = RotaryAngles(torch.tensor([1.0, 0.1], dtype=torch.float64))
    query, positions = torch.randn(2, 3, 4), torch.tensor([5, 9], dtype=torch.int32)
    cos, sin = angles.cos_sin(positions)
    expected = rotate(query, cos[:, None], sin[:, None])
    phases = Phases.of(angles, device=device)
    found = rotate_queries(query.to(device), positions.to(device), phases).cpu()
    assert math.isclose(float((found - expected).abs().max()), 0.0, abs_tol=4e-6)
