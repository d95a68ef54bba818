"""Kernels that dequantize pages, against the specification computed in f64.

With ``u`` the unit roundoff of f32 and ``h`` that of f16, both for a number and what it is made of:

* before RoPE a key is ``e * r + c``, its outlier adds ``n * s * r``. In f32: two roundings, two of
  the residual, one where it is added. Each is at most ``u`` times the *size*
  ``|e r| + |n s r| + |c|``, together ``5 u size``. A value likewise.
* In f16 entry and centre are rounded before, one ``h`` of the size together, and so is what is
  stored: once, and once again for every outlier that reaches the number.
* A rotated number is made of both members of its pair, of which each counts with its size times
  ``s``, the scaling of the rotation. In f32: two roundings before; the product, the scaling of
  the cosine and the sum; or of a residual two, the scaling, the product; and two sums, because it
  reaches two numbers and is reached by two. Together at most ``8 u``, and what ``cos_sin`` is off.

A number below the normal ones of f16 is rounded by ``2**-25``, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_formats import pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, LayerParameters, ValueParameters
from kvq_kernels.dequantize import KeyDequantizer, ValueDequantizer, apply_scales
from kvq_kernels.dequantize_pages import dequantize_keys, dequantize_values
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.phases import COS_SIN_ERROR, Phases
from kvq_kernels.rotary import RotaryAngles
from rounding import Stored

U, HALF_U, SUBNORMAL = 2.0**-24, 2.0**-11, 2.0**-25
MORE = 1 + 2.0**-9
"""For products of roundings."""

POOLS = {
    "none": {"outlier_fraction": 0.0},
    "full": {"outlier_fraction": 0.02, "outlier_capacity": 0.05, "value_capacity_factor": 4.0},
    "overflowing": {
        "outlier_fraction": 0.06,
        "outlier_capacity": 0.002,
        "value_capacity_factor": 1.0,
    },
}


def codebook(bits: int) -> Codebook:
    """Entries without symmetry, so that no two codes can be mistaken for each other."""
    return Codebook.fit_grid(torch.linspace(-1, 1.2, 1 << bits).sinh())


def heavy(H: int, T: int, D: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(H, T, D, generator=generator) / 2
    return x * torch.where(torch.rand(H, T, D, generator=generator) < 0.02, 6.0, 1.0)


def moved(packed: Any, device: torch.device) -> Any:
    return type(packed)(*(getattr(packed, f.name).to(device) for f in fields(packed)))


@dataclass
class Layer:
    """Pages of one layer on the CPU, and what they were encoded with."""

    config: KVQConfig
    parameters: LayerParameters
    keys: KeyPages
    values: ValuePages
    angles: RotaryAngles

    @property
    def shape(self) -> tuple[int, int, int]:
        P, H, _, _, D = self.keys.words.shape
        return P, H, D

    def tables(self, device: torch.device) -> KernelTables:
        return KernelTables.of(self.parameters, self.config, device=device)

    def phases(self, device: torch.device) -> Phases:
        return Phases.of(self.angles, device=device)


def make_layer(
    *,
    bits: tuple[int, int] = (4, 3),
    H: int = 2,
    D: int = 16,
    half: int | None = None,
    pools: str = "full",
    grain: str = "token",
    P: int = 2,
    scaling: float = 1.0,
    seed: int = 0,
) -> Layer:
    config = KVQConfig(
        key_bits=bits[0], value_bits=bits[1], value_grain=grain, qnorm=False, **POOLS[pools]
    )
    generator = torch.Generator().manual_seed(seed)
    parameters = LayerParameters(
        key=KeyParameters(
            center=torch.randn(H, D, generator=generator) / 8,
            half_range=torch.rand(H, D, generator=generator) + 0.5,
            codebook=codebook(bits[0]),
            outlier_step=0.013,
        ),
        value=ValueParameters(codebook=codebook(bits[1]), outlier_step=0.07),
    )
    half = D // 2 if half is None else half
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    T = P * PAGE_TOKENS
    return Layer(
        config=config,
        parameters=parameters,
        keys=pages.encode_keys(
            heavy(H, T, D, seed=seed + 1), parameters.key, config, first_position=1
        ),
        values=pages.encode_values(heavy(H, T, D, seed=seed + 2), parameters.value, config),
        angles=RotaryAngles(frequencies, scaling),
    )


def key_numbers(layer: Layer) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and their sizes, f64 ``[P, H, 256, D]``."""
    key, stored = layer.parameters.key, Stored.of(layer.keys)
    half_range, center = (x.double()[:, None] for x in (key.half_range, key.center))
    dense = key.codebook.decode_entries[stored.codes].double() * half_range
    residual = stored.steps * float(torch.tensor(key.outlier_step)) * half_range
    return dense + residual + center, dense.abs() + residual.abs() + center.abs()


def value_numbers(layer: Layer) -> tuple[Tensor, Tensor]:
    value, stored = layer.parameters.value, Stored.of(layer.values)
    half_range, center = layer.values.scales.double().split(1, dim=-1)
    dense = value.codebook.decode_entries[stored.codes].double() * half_range
    residual = stored.steps * float(torch.tensor(value.outlier_step)) * half_range
    return dense + residual + center, dense.abs() + residual.abs() + center.abs()


def positions_of(layer: Layer, irregular: Tensor | None) -> Tensor:
    base = layer.keys.base_positions.long()
    positions = base[:, None] + torch.arange(PAGE_TOKENS)
    for place, start in enumerate(base.tolist()):
        if start < 0:
            assert irregular is not None
            positions[place] = irregular[-1 - start]
    return positions


def turned(layer: Layer, numbers: Tensor, sizes: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Rotated in f64, and the sizes of what they are made of."""
    half, s = len(layer.angles.frequencies), layer.angles.scaling
    angles = positions.double()[:, None, :, None] * layer.angles.frequencies
    cos, sin = angles.cos() * s, angles.sin() * s
    first, second, rest = numbers.tensor_split((half, 2 * half), dim=-1)
    both = s * (sizes[..., :half] + sizes[..., half : 2 * half])
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(rotated, -1), torch.cat([both, both, sizes[..., 2 * half :]], -1)


def by_token(x: Tensor, ids: Tensor | None) -> Tensor:
    """``[P, H, 256, D]`` -> ``[H, n * 256, D]``."""
    x = x if ids is None else x[ids]
    return x.movedim(1, 0).flatten(1, 2)


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.isfinite().all()
    excess = (found.cpu().double() - expected).abs() / bound
    assert excess.max() <= 1, f"{excess.max():.3f} of the bound"


def assert_keys(
    layer: Layer,
    device: torch.device,
    *,
    ids: Tensor | None = None,
    rotate: bool = True,
    irregular: Tensor | None = None,
) -> None:
    numbers, sizes = key_numbers(layer)
    shifted = torch.full_like(sizes, 4.0)
    outliers = layer.keys.outliers.shape[-1] > 0
    off, stores = 5 * U, 1 + outliers
    if rotate:
        numbers, sizes = turned(layer, numbers, sizes, positions_of(layer, irregular))
        off, stores = 8 * U + COS_SIN_ERROR, 1 + 2 * outliers
    expected, sizes, shifted = (by_token(x, ids) for x in (numbers, sizes, shifted))
    bounds = {
        torch.float32: off * MORE * sizes,
        torch.float16: (off + (1 + stores) * HALF_U) * MORE * sizes
        # Of an entry times a half-range, of a centre, and of what is stored.
        + SUBNORMAL * (2 * layer.angles.scaling * (1.5 + 1) + stores),
    }
    for dtype, bound in bounds.items():
        found = dequantize_keys(
            moved(layer.keys, device),
            None if ids is None else ids.to(device),
            layer.tables(device),
            layer.phases(device) if rotate else None,
            irregular_positions=None if irregular is None else irregular.to(device),
            dtype=dtype,
        )
        assert found.dtype == dtype
        assert_within(found, expected, bound)


def assert_values(layer: Layer, device: torch.device, *, ids: Tensor | None = None) -> None:
    numbers, sizes = (by_token(x, ids) for x in value_numbers(layer))
    stores = 1 + (layer.values.outliers.shape[-1] > 0)
    ranges = layer.values.scales[..., :1].double().amax()
    bounds = {
        torch.float32: 5 * U * MORE * sizes,
        torch.float16: (5 * U + (1 + stores) * HALF_U) * MORE * sizes
        + SUBNORMAL * (ranges + stores),
    }
    for dtype, bound in bounds.items():
        found = dequantize_values(
            moved(layer.values, device),
            None if ids is None else ids.to(device),
            layer.tables(device),
            dtype=dtype,
        )
        assert_within(found, numbers, bound)


@pytest.mark.parametrize("bits", [(2, 3), (3, 4), (4, 2)])
@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("grain", ["token", "head"])
def test_widths_pools_and_grains(
    bits: tuple[int, int], pools: str, grain: str, device: torch.device
) -> None:
    layer = make_layer(bits=bits, pools=pools, grain=grain, P=1)
    assert_keys(layer, device)
    assert_values(layer, device)


@pytest.mark.parametrize(
    ("D", "half"), [(64, 32), (80, 10), (96, 48), (128, 64), (16, 8), (16, 2), (32, 0)]
)
@pytest.mark.parametrize("bits", [(3, 3), (2, 4)])
def test_head_dims(D: int, half: int, bits: tuple[int, int], device: torch.device) -> None:
    layer = make_layer(bits=bits, H=1, P=1, D=D, half=half, pools="full")
    assert_keys(layer, device)
    assert_values(layer, device)


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4)])
def test_before_rope_they_are_what_the_torch_reference_gives(
    bits: tuple[int, int], device: torch.device
) -> None:
    layer = make_layer(bits=bits, P=1)
    assert_keys(layer, device, rotate=False)
    key, value = layer.parameters.key, layer.parameters.value
    reference = KeyDequantizer(key, bits=bits[0]).dequantize(layer.keys)
    normalised = ValueDequantizer(value, bits=bits[1]).dequantize(layer.values)
    # What the tests here take for the specification is it, but for the reference's roundings.
    numbers, sizes = key_numbers(layer)
    assert_within(reference, numbers, 5 * U * MORE * sizes)
    numbers, sizes = value_numbers(layer)
    assert_within(apply_scales(*normalised), numbers, 5 * U * MORE * sizes)


def test_ids_in_any_order_and_repeated(device: torch.device) -> None:
    layer = make_layer(P=3, H=1)
    for dtype in (torch.int32, torch.int64):
        ids = torch.tensor([2, 0, 2], dtype=dtype)
        assert_keys(layer, device, ids=ids)
        assert_values(layer, device, ids=ids)


@pytest.mark.parametrize("base", [1_048_320, 2_000_000_000])
def test_positions_far_out(base: int, device: torch.device) -> None:
    layer = make_layer(P=1, H=1, scaling=1.3)
    layer.keys.base_positions.fill_(base)
    assert_keys(layer, device)


def test_positions_that_jump(device: torch.device) -> None:
    layer = make_layer(P=3, H=1)
    generator = torch.Generator().manual_seed(4)
    irregular = torch.randint(0, 2**20, (2, PAGE_TOKENS), generator=generator).int()
    layer.keys.base_positions.copy_(torch.tensor([-2, 700, -1]))
    assert_keys(layer, device, irregular=irregular)


def test_no_pages(device: torch.device) -> None:
    layer = make_layer(P=1)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    tables = layer.tables(device)
    keys = dequantize_keys(moved(layer.keys, device), none, tables, layer.phases(device))
    values = dequantize_values(moved(layer.values, device), none, tables)
    assert keys.shape == values.shape == (2, 0, 16)
    # Nor pages that there are none of.
    empty = make_layer(P=0)
    keys = dequantize_keys(moved(empty.keys, device), None, tables)
    assert keys.shape == (2, 0, 16)


def test_every_place_of_what_is_given_is_written(device: torch.device) -> None:
    layer = make_layer(D=80, half=10, P=1, H=1)
    out = torch.full((1, PAGE_TOKENS, 80), torch.nan, dtype=torch.float16, device=device)
    tables = layer.tables(device)
    given = dequantize_keys(moved(layer.keys, device), None, tables, layer.phases(device), out=out)
    assert given is out
    assert out.isfinite().all()
    out.fill_(torch.nan)
    dequantize_values(moved(layer.values, device), None, tables, out=out)
    assert out.isfinite().all()


def test_f16_saturates(device: torch.device) -> None:
    layer = make_layer(P=1, H=1, pools="full")
    scales = layer.values.scales.clone()
    scales[:, :, :7] = torch.tensor([6e4, 3e4], dtype=torch.float16)
    scales[:, :, 7:9] = torch.tensor([6e4, -3e4], dtype=torch.float16)
    layer = replace(layer, values=replace(layer.values, scales=scales))
    numbers, _ = value_numbers(layer)
    assert numbers.abs().max() > 66_000
    pages_there, tables = moved(layer.values, device), layer.tables(device)
    found = dequantize_values(pages_there, None, tables, dtype=torch.float16).cpu()
    assert found.isfinite().all()
    beyond = by_token(numbers.abs() > 66_000, None)
    # A residual that points back may come after the saturation.
    plain = beyond & by_token(Stored.of(layer.values).steps == 0, None)
    assert plain.any()
    assert (found[plain].abs() == 65_504).all()
