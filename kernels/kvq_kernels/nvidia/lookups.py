"""Codes to numbers by byte permutes: PTX that works on two neighbours' f16 in one register.

``prmt`` takes eight bytes from two registers and gives the four that the nibbles of a third name.
Codes lie in nibbles, or are brought there, so a word *is* the selector and a codebook is a table of
bytes in registers: nothing is loaded, and all lanes look up at full rate.

An entry of a codebook is ``offset + step * level`` with a level of one byte. 2- and 3-bit keys look
up both bytes of the entry in f16. Values, and keys of 4 bits, look up the level and set the byte
0x64 above it, which is ``1024 + level`` in f16, exactly; ``tables`` says where offset and step go.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia.lookup_ptx import (
    ENTRIES_2,
    ENTRIES_3,
    FOURTH_BITS_HIGH,
    FOURTH_BITS_LOW,
    LEVELS_2,
    LEVELS_3,
    LEVELS_4,
    MINUS_1024,
    SPARE_WORDS,
)

NIBBLES: Final = gl.constexpr(0x77777777)
"""Three bits of each nibble: a fourth would ask ``prmt`` for a byte of sign."""

PAIRS: Final = gl.constexpr(0x33333333)
"""Two bits of each nibble."""


@gluon.jit
def selectors(words, GROUP_OF_PLANE: gl.constexpr, BITS: gl.constexpr):
    """Selectors of a group of 64 tokens, two i32: in the low halves nibbles of two subsets each.

    ``subset_of`` says which.
    """
    if BITS == 2:
        first = words & PAIRS
        second = (words >> 2) & PAIRS
        if GROUP_OF_PLANE == 1:
            first = first >> 16
            second = second >> 16
    else:
        first = words & NIBBLES
        second = first >> 16
    return first, second


@gluon.constexpr_function
def subset_of(part, place, bits):
    """Which subset of 16 tokens of a group the ``place``-th number of selector ``part`` is."""
    return part + 2 * place if bits == 2 else 2 * part + place


@gluon.jit
def _one(PTX: gl.constexpr, CONSTRAINTS: gl.constexpr, operands):
    return gl.inline_asm_elementwise(
        PTX, CONSTRAINTS, operands, dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _two(PTX: gl.constexpr, CONSTRAINTS: gl.constexpr, operands):
    return gl.inline_asm_elementwise(
        PTX, CONSTRAINTS, operands, dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def spare_words(first, second, third):
    """Words of the fourth group of 64 tokens at 3 bits: the fourth bits of three planes."""
    return _one(SPARE_WORDS, "=r,r,r,r", (first, second, third))


@gluon.jit
def value_numbers(words, selector, table, PART: gl.constexpr, BITS: gl.constexpr):
    """``1024 + level`` of two subsets, two i32 that hold two f16 each."""
    if BITS == 2:
        numbers = _two(LEVELS_2, "=r,=r,r,r", (selector, table[0]))
    elif BITS == 3:
        numbers = _two(LEVELS_3, "=r,=r,r,r,r", (selector, table[0], table[1]))
    else:
        shifted = words << 4
        FOURTH_BITS: gl.constexpr = FOURTH_BITS_LOW if PART == 0 else FOURTH_BITS_HIGH
        upper = _one(FOURTH_BITS, "=r,r,r", (shifted, words))
        operands = (selector, upper, table[0], table[1], table[2], table[3])
        numbers = _two(LEVELS_4, "=r,=r,r,r,r,r,r,r", operands)
    return numbers


@gluon.jit
def key_numbers(words, selector, table, PART: gl.constexpr, BITS: gl.constexpr):
    """Entries, or at 4 bits levels, of two subsets: two i32 that hold two f16 each."""
    if BITS == 2:
        numbers = _two(ENTRIES_2, "=r,=r,r,r,r", (selector, table[0], table[1]))
    elif BITS == 3:
        operands = (selector, table[0], table[1], table[2], table[3])
        numbers = _two(ENTRIES_3, "=r,=r,r,r,r,r,r", operands)
    else:
        found = value_numbers(words, selector, table, PART, BITS)
        numbers = (
            _one(MINUS_1024, "=r,r", (found[0],)),
            _one(MINUS_1024, "=r,r", (found[1],)),
        )
    return numbers
