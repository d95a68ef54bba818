"""What the kernels of ``ceiling_kernels`` should leave: plain torch, from a launch's arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpu_paths import Launched
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.packing import unpack_keys, unpack_values
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.packed_rows import PAGE_ID_MASK

U16, U32 = 2.0**-11, 2.0**-24
DEVIATIONS = 6


@dataclass(frozen=True)
class Expected:
    """Results of all programs; splits are S.

    Fields:
        unpack: i32 ``[B, H, S]``, exactly.
        keys: f64 ``[B, H, S, G]``, without any rounding.
        key_sums: as large as keys, what sums in f32 are off by.
        key_roundings: what keys that are rounded to f16 are off by, beside; 0 is what the numbers
            of exact cases (``packed_cases``) are off by.
        values: f64 ``[B, H, S, D]``, exactly as far as f32 holds integers.
    """

    unpack: Tensor
    keys: Tensor
    key_sums: Tensor
    key_roundings: Tensor
    values: Tensor


def expected(launched: Launched, tables: KernelTables) -> Expected:
    """For the pages that each program of ``launched`` reads."""
    arguments = launched.arguments
    splits, H, B = launched.grid
    G, D = arguments["G"], arguments["D"]
    device = arguments["key_words"].device
    f64 = {"dtype": torch.float64, "device": device}
    found = Expected(
        unpack=torch.zeros(B, H, splits, dtype=torch.int32, device=device),
        keys=torch.zeros(B, H, splits, G, **f64),
        key_sums=torch.zeros(B, H, splits, G, **f64),
        key_roundings=torch.zeros(B, H, splits, G, **f64),
        values=torch.zeros(B, H, splits, D, **f64),
    )
    for batch, pages in enumerate(arguments["lengths"][:, 0].tolist()):
        each = -(-pages // splits)
        for split in range(splits):
            places = slice(split * each, min((split + 1) * each, pages))
            if places.start >= places.stop:
                continue
            _add_split(found, (batch, slice(None), split), places, arguments, tables)
    return found


def _add_split(
    found: Expected,
    at: tuple[int, slice, int],
    places: slice,
    arguments: dict[str, Tensor],
    tables: KernelTables,
) -> None:
    ids = (arguments["block_table"][at[0], places] & PAGE_ID_MASK).long()
    numbers = _key_numbers(arguments["key_words"][ids], tables)  # [n, H, 256, D]
    levels = _value_levels(arguments["value_words"][ids], tables)  # [n, H, D, 256]
    pairs = (_pairs(numbers), _pairs((1024 + levels).half()))
    found.unpack[at] = _xor(torch.cat([_xor(each)[:, None] for each in pairs], dim=1))
    found.values[at] = (1024 + levels).double().sum((0, 3))

    H, D = numbers.shape[1], numbers.shape[-1]
    scale, zero = (
        arguments[name].view(torch.float16).view(H, 1, D).double()
        for name in ("key_scale", "key_zero")
    )
    cos, sin = (
        arguments[name].view(torch.float16).view(PAGE_TOKENS, D // 2).double()
        for name in ("offset_cos", "offset_sin")
    )
    first, second = (numbers.double() * scale + zero).chunk(2, dim=-1)
    keys = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).sum(2)
    largest = (first.abs() + second.abs()).sum(2).repeat(1, 1, 2)
    queries = arguments["page_queries"][at[0], :, places, : arguments["G"]].double()
    found.keys[at] = torch.einsum("nhd,hngd->hg", keys, queries)
    # Terms of a sum that f32 takes one after the other: channels, then tokens of a lane, pages.
    terms = D + len(ids) + PAGE_TOKENS
    absolute = torch.einsum("nhd,hngd->hgd", largest, queries.abs())
    found.key_sums[at] = terms * U32 * absolute.sum(-1)
    # Three roundings a key. Those of a channel may all go one way, channels are independent.
    found.key_roundings[at] = DEVIATIONS * 3 * U16 * absolute.square().sum(-1).sqrt()


def _key_numbers(words: Tensor, tables: KernelTables) -> Tensor:
    bits = tables.config.key_bits
    codebook = tables.parameters.key.codebook
    entries = codebook.levels if bits == 4 else codebook.decode_entries
    codes = unpack_keys(words.view(torch.int16), bits=bits).int()
    return entries.to(words.device).half()[codes]


def _value_levels(words: Tensor, tables: KernelTables) -> Tensor:
    codes = unpack_values(words.view(torch.int16), bits=tables.config.value_bits).int()
    levels = tables.parameters.value.codebook.levels.to(words.device).int()[codes]
    return levels.transpose(-1, -2)


def _pairs(numbers: Tensor) -> Tensor:
    """f16 ``[n, H, ...]``, neighbours in one i32 ``[H, N]``."""
    return numbers.contiguous().view(torch.int32).transpose(0, 1).flatten(1)


def _xor(numbers: Tensor) -> Tensor:
    """Of all, i32 ``[H, N]`` to ``[H]``."""
    while numbers.shape[1] > 1:
        if numbers.shape[1] % 2:
            numbers = torch.nn.functional.pad(numbers, (0, 1))
        numbers = torch.bitwise_xor(*numbers.chunk(2, dim=1))
    return numbers[:, 0]
