"""Lookups of the fast path, bit for bit: their PTX runs on a machine in numpy, on every code."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from kvq_formats.codebook import Codebook
from kvq_formats.packing import pack_keys
from kvq_kernels.nvidia import lookup_ptx
from kvq_kernels.nvidia.tables import entry_words, level_words
from ptx_machine import run


def execute(ptx: str, outputs: int, *operands: Tensor) -> list[Tensor]:
    """Run a piece of PTX on i32 tensors ``[N]``, one thread an element, N a multiple of 32."""
    threads, inputs = len(operands[0]), len(operands)
    operands_of_all = range(outputs + inputs)
    body = re.sub(r"\$(\d+)", lambda match: f"%r{match[1]}", ptx)
    addresses = "\n".join(
        f"ld.param.u64 %a{i}, [k_param_{i}]; add.u64 %a{i}, %a{i}, %at;" for i in operands_of_all
    )
    loads = "\n".join(f"ld.global.b32 %r{i}, [%a{i}];" for i in operands_of_all[outputs:])
    stores = "\n".join(f"st.global.b32 [%a{i}], %r{i};" for i in range(outputs))
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry k({", ".join(f".param .u64 k_param_{i}" for i in operands_of_all)})
{{
.reg .b32 %r<{outputs + inputs}>; .reg .b32 %t; .reg .b64 %at; .reg .b64 %a<{outputs + inputs}>;
mov.u32 %t, %tid.x;
mul.wide.u32 %at, %t, 4;
{addresses}
{loads}
{body}
{stores}
ret;
}}
"""
    found = [torch.zeros(threads, dtype=torch.int32) for _ in range(outputs)]
    given = [operand.contiguous() for operand in operands]
    run(text, grid=(1,), threads=threads, arguments=[*found, *given], shared_bytes=0)
    return found


def halves(words: Tensor) -> Tensor:
    """i32 ``[...]`` to f16 ``[..., 2]``, lower one first."""
    return words.contiguous().view(torch.float16).view(*words.shape, 2)


def codebook(bits: int, seed: int) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    return Codebook.fit_grid(torch.randn(1 << bits, generator=generator).sort().values)


def selectors_of(codes: Tensor, bits: int) -> Tensor:
    """Four codes ``[N, 4]`` in the nibbles of a word, garbage in its upper half."""
    nibbles = (codes & ((1 << bits) - 1 if bits < 4 else 7)).int()
    word = sum(nibbles[:, i] << (4 * i) for i in range(4))
    return word | torch.arange(len(codes), dtype=torch.int32) << 16


def all_codes(bits: int) -> Tensor:
    """Every four codes, i64 ``[N, 4]``, a few thousand at random at 4 bits."""
    if bits == 4:
        return torch.randint(16, (1024, 4), generator=torch.Generator().manual_seed(0))
    grids = torch.meshgrid(*[torch.arange(1 << bits)] * 4, indexing="ij")
    found = torch.stack([grid.flatten() for grid in grids], dim=-1)
    return found if bits == 2 else found[torch.randperm(len(found))[:1024]]


def table(words: Tensor, threads: int) -> list[Tensor]:
    return [word.expand(threads) for word in words]


def in_threads(ptx: str, outputs: int, *operands: Tensor) -> list[Tensor]:
    """``execute``, 256 threads at a time."""
    parts = [
        execute(ptx, outputs, *part) for part in zip(*(o.split(256) for o in operands), strict=True)
    ]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", [2, 3])
def test_entries(bits: int, seed: int) -> None:
    book, codes = codebook(bits, seed), all_codes(bits)
    words = table(entry_words(book), len(codes))
    ptx = {2: lookup_ptx.ENTRIES_2, 3: lookup_ptx.ENTRIES_3}[bits].value
    first, second = in_threads(ptx, 2, selectors_of(codes, bits), *words)
    numbers = book.decode_entries.half()[codes]
    # Codes of the neighbours alternate at 3 bits; at 2 bits those of one lie side by side.
    order = [[0, 2], [1, 3]] if bits == 2 else [[0, 1], [2, 3]]
    assert torch.equal(halves(first), numbers[:, order[0]])
    assert torch.equal(halves(second), numbers[:, order[1]])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels(bits: int, seed: int) -> None:
    book, codes = codebook(bits, seed), all_codes(bits)
    words = table(level_words(book), len(codes))
    operands = [selectors_of(codes, bits)]
    if bits == 4:
        full = sum((codes[:, i] << (4 * i)).int() for i in range(4))
        low = in_threads(lookup_ptx.FOURTH_BITS_LOW.value, 1, full << 4, full)[0]
        high = in_threads(lookup_ptx.FOURTH_BITS_HIGH.value, 1, full << 20, full << 16)[0]
        assert torch.equal(low, high)
        operands.append(low)
    ptx = {2: lookup_ptx.LEVELS_2, 3: lookup_ptx.LEVELS_3, 4: lookup_ptx.LEVELS_4}[bits].value
    found = in_threads(ptx, 2, *operands, *words)
    levels = book.levels.half()[codes]
    order = [[0, 2], [1, 3]] if bits == 2 else [[0, 1], [2, 3]]
    for numbers, places in zip(found, order, strict=True):
        assert torch.equal(halves(numbers), 1024 + levels[:, places])
        (plain,) = in_threads(lookup_ptx.MINUS_1024.value, 1, numbers)
        assert torch.equal(halves(plain), levels[:, places])


def test_spare_words() -> None:
    """The fourth group of packed pages at 3 bits: bits of three planes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (256, 64), generator=generator, dtype=torch.int32)
    words = pack_keys(codes, bits=3).view(torch.int32)  # [3, 16, 32]
    (found,) = in_threads(lookup_ptx.SPARE_WORDS.value, 1, *(plane.flatten() for plane in words))
    nibbles = found.view(16, 32)[..., None] >> torch.arange(0, 32, 4) & 7
    spare = codes[192:].view(4, 16, 32, 2)
    expected = spare.permute(1, 2, 0, 3).reshape(16, 32, 8)
    assert torch.equal(nibbles, expected)
