"""Packed words to numbers in kernels: two neighbours' codes are one index into a table of pairs.

A word of 32 bits holds the codes of two neighbours from several subsets (``kvq_formats.packing``).
A shift and a mask leave both codes of a subset, and one load of 32 bits gives both numbers in f16.
The table has 16, 128 or 256 words (2, 3, 4 bits) and stays in the first-level cache. Kernels read
pages in *groups* of 64 tokens: four subsets of 16, one plane, or half a plane at 2 bits.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_formats.codebook import Codebook

GROUP: Final = tl.constexpr(64)
"""Tokens of a group."""

GROUPS: Final = tl.constexpr(4)
"""Groups of a page."""

_UPPER_SHIFT: Final = {2: 2, 3: 4, 4: 4}
"""Where the code of the upper neighbour begins in an index."""


def pair_table(codebook: Codebook, *, device: torch.device | str) -> Tensor:
    """Both decoded numbers of every index, i32 ``[16, 128 or 256]``: two f16, lower one first."""
    code = (1 << codebook.bits) - 1
    upper = _UPPER_SHIFT[codebook.bits]
    index = torch.arange(1 << (upper + codebook.bits))
    codes = torch.stack([index & code, index >> upper & code], dim=-1)
    numbers = codebook.decode_entries.cpu()[codes].half()
    return numbers.view(torch.int32).flatten().to(device)


@triton.jit
def group_words(plane_stride, words, group, BITS: tl.constexpr, SPARE: tl.constexpr, inside=None):
    """Words i32 of one group, to be shifted by ``group_shift``; anything where not ``inside``.

    ``words`` points to places of plane 0. SPARE says that this is the fourth group: at 3 bits it
    has no plane and is gathered from the fourth bits of the nibbles of the three others.
    """
    if BITS == 2:
        return tl.load(words + (group // 2) * plane_stride, mask=inside)
    if BITS == 3 and SPARE:
        spare = (tl.load(words, mask=inside) >> 3) & 0x11111111
        spare |= (tl.load(words + plane_stride, mask=inside) >> 2) & 0x22222222
        return spare | ((tl.load(words + 2 * plane_stride, mask=inside) >> 1) & 0x44444444)
    return tl.load(words + group * plane_stride, mask=inside)


@triton.jit
def group_shift(subset, group, BITS: tl.constexpr):
    """Where the pair of codes of a group's subset, 0 to 3, begins in its words."""
    if BITS == 2:
        return subset * 2 + (group % 2) * 16
    return subset * 8


@triton.jit
def decode_pairs(words, shift, table, BITS: tl.constexpr):
    """Numbers f16 ``[..., 2 n]`` of words i32 ``[..., n]``: neighbours side by side."""
    if BITS == 2:
        index = (words >> shift) & 0x0303
        index = (index | (index >> 6)) & 0xF
    elif BITS == 3:
        index = (words >> shift) & 0x77
    else:
        index = (words >> shift) & 0xFF
    # Unsigned, so that no sign has to be carried into the address.
    pair = tl.load(table + index.to(tl.uint32, bitcast=True))
    lower = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    upper = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(lower, upper), [words.shape[0], 2 * words.shape[1]])
