"""Packed rows of made-up numbers, for kernels and their references.

With ``exact=True`` every number that a kernel holds in 16 bits is one of few bits: codebook
entries, half-ranges and queries are small multiples of powers of two, and frequencies are whole
quarter turns, so that cosines and sines are 0, 1 and -1. Scores then carry no rounding, and a bound
on what is left is tight enough to see a single token that is out of place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.pages import KeyPages, ValuePages, encode_keys, encode_values
from kvq_formats.parameters import KeyParameters, LayerParameters, ValueParameters
from kvq_kernels.packed_rows import PackedRows, table_entry
from kvq_kernels.rotary import RotaryAngles

SINKS = 1


@dataclass
class PackedCase:
    """One layer's rows and a query for each; everything on one device.

    Fields:
        query: ``[B, HQ, D]``.
        scaling: of the scores.
    """

    query: Tensor
    rows: PackedRows
    parameters: LayerParameters
    config: KVQConfig
    angles: RotaryAngles
    scaling: float


def split_tokens(tokens: int, window: int = PAGE_TOKENS) -> tuple[int, int, int]:
    """Pages, sinks and tail of a row that holds ``tokens``, as a cache keeps them."""
    sinks = min(SINKS, tokens)
    pages = max(0, -(-(tokens - sinks - window) // PAGE_TOKENS))
    return pages, sinks, tokens - sinks - pages * PAGE_TOKENS


def make_codebook(bits: int, generator: torch.Generator) -> Codebook:
    """Uneven entries, multiples of 1/64 between -1 and 1: exact in f16."""
    levels = torch.randperm(126, generator=generator)[: (1 << bits) - 2].sort().values + 1
    levels = torch.cat([torch.tensor([0]), levels, torch.tensor([127])]).to(torch.uint8)
    offset, step = -1.0, 1 / 64
    return Codebook(offset + step * levels.float(), levels, offset, step)


def make_case(
    *,
    tokens: tuple[int, ...] = (700,),
    key_bits: int = 3,
    value_bits: int = 3,
    D: int = 64,
    rotary_dim: int | None = None,
    H: int = 1,
    G: int = 4,
    outlier_fraction: float = 0.01,
    exact: bool = True,
    spread: float = 1.1,
    first_position: int = 0,
    rotary_scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    exact_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **config: Any,
) -> PackedCase:
    """Rows that hold ``tokens`` tokens each; ``spread`` beyond 1 makes outliers of keys."""
    generator = torch.Generator().manual_seed(seed)

    def steps(*shape: int, of: float, least: int, most: int) -> Tensor:
        return torch.randint(least, most + 1, shape, generator=generator) * of

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    R = D if rotary_dim is None else rotary_dim
    options = KVQConfig.create(
        key_bits=key_bits, value_bits=value_bits, outlier_fraction=outlier_fraction, **config
    )
    half_range = torch.exp2(steps(H, D, of=1.0, least=-1, most=1).float())
    center = steps(H, D, of=0.25, least=-4, most=4)
    if not exact:
        half_range, center = normal(H, D).abs() + 0.3, normal(H, D)
    parameters = LayerParameters(
        key=KeyParameters(half_range=half_range, center=center.float(),
                          codebook=make_codebook(key_bits, generator), outlier_step=1 / 32),
        value=ValueParameters(make_codebook(value_bits, generator), outlier_step=1 / 32),
    )  # fmt: skip
    shares = [split_tokens(count) for count in tokens]
    B, P = len(shares), sum(pages for pages, _, _ in shares)
    z = (torch.rand(H, P * PAGE_TOKENS, D, generator=generator) * 2 - 1) * spread
    keys = z * half_range[:, None] + center[:, None]
    key_pages = encode_keys(keys, parameters.key, options)
    value_pages = encode_values(normal(H, P * PAGE_TOKENS, D), parameters.value, options)
    width = max(pages for pages, _, _ in shares) + 1
    table = torch.zeros(B, width, dtype=torch.int32)
    # Pages of a row lie anywhere in the pool.
    places = torch.randperm(P, generator=generator)
    used = 0
    for row, (pages, sinks, _) in enumerate(shares):
        for index in range(pages):
            place = int(places[used])
            table[row, index] = table_entry(place, PAGE_TOKENS)
            key_pages.base_positions[place] = first_position + sinks + index * PAGE_TOKENS
            used += 1
    room = SINKS + PAGE_TOKENS
    shape = (B, H, room, D)
    exact_keys = steps(*shape, of=0.125, least=-16, most=16) if exact else normal(*shape)
    exact_values = normal(*shape)
    positions = torch.zeros(B, room, dtype=torch.int32)
    for row, (pages, sinks, tail) in enumerate(shares):
        held = sinks + tail
        positions[row, :sinks] = torch.arange(sinks) + first_position
        start = first_position + sinks + pages * PAGE_TOKENS
        positions[row, sinks:held] = torch.arange(start, start + tail)
        # What lies behind a row's tokens must not be looked at.
        exact_keys[row, :, held:] = exact_values[row, :, held:] = math.nan
        positions[row, held:] = torch.iinfo(torch.int32).max
    frequencies = (torch.arange(R // 2) + 1).remainder(4).double() * (math.pi / 2)
    if not exact:
        frequencies = 500_000.0 ** (-torch.arange(R // 2, dtype=torch.float64) / max(1, R // 2))
    query = steps(B, H * G, D, of=0.125, least=-8, most=8) if exact else normal(B, H * G, D)
    # The largest number of each head, by which kernels divide.
    query[..., 0] = 2.0 ** torch.randint(1, 4, (B, H * G), generator=generator)
    rows = PackedRows(
        key_pages=key_pages,
        value_pages=value_pages,
        block_table=table,
        lengths=torch.tensor(shares, dtype=torch.int32).reshape(B, 3),
        exact_keys=exact_keys.to(exact_dtype),
        exact_values=exact_values.to(exact_dtype),
        exact_positions=positions,
    )
    return PackedCase(
        query=query.to(dtype).to(device),
        rows=on_device(rows, device),
        parameters=parameters,
        config=options,
        angles=RotaryAngles(frequencies.to(device), rotary_scaling),
        scaling=D**-0.5,
    )


def on_device(rows: PackedRows, device: torch.device | str) -> PackedRows:
    """The same rows elsewhere."""

    def moved(pages: Any) -> Any:
        return type(pages)(*(field.to(device) for field in vars(pages).values()))

    irregular = rows.irregular_positions
    return PackedRows(
        moved(rows.key_pages),
        moved(rows.value_pages),
        *(
            tensor.to(device)
            for tensor in (
                rows.block_table,
                rows.lengths,
                rows.exact_keys,
                rows.exact_values,
                rows.exact_positions,
            )
        ),
        None if irregular is None else irregular.to(device),
    )


def cut_last_pages(case: PackedCase, length: int) -> PackedCase:
    """Every row's last page keeps ``length`` tokens and the row has no tail behind it."""
    rows = case.rows
    table, lengths = rows.block_table.clone(), rows.lengths.clone()
    for row, (pages, _, _) in enumerate(lengths.tolist()):
        if pages:
            table[row, pages - 1] += table_entry(0, length)
            lengths[row, 2] = 0
    return replace(case, rows=replace(rows, block_table=table, lengths=lengths))


def pages_of(case: PackedCase) -> tuple[KeyPages, ValuePages]:
    """The pool."""
    return case.rows.key_pages, case.rows.value_pages
