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
    """Which subset of a group of 64 tokens a lookup gives: its ``place``-th of selector ``part``."""
    return part + 2 * place if bits == 2 else 2 * part + place


@gluon.jit
def spare_words(first, second, third):
    """Words of the fourth group of 64 tokens at 3 bits: the fourth bits of three planes."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 s;
        shr.u32 s, $1, 1;
        lop3.b32 s, s, $2, 0x44444444, 0xE4;
        shr.u32 s, s, 1;
        lop3.b32 s, s, $3, 0x77777777, 0xE4;
        shr.u32 $0, s, 1;
        }""",
        "=r,r,r,r",
        [first, second, third],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _entries_2(selector, low, high):
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 l, h;
        prmt.b32 l, $3, $3, $2;
        prmt.b32 h, $4, $4, $2;
        prmt.b32 $0, l, h, 0x6240;
        prmt.b32 $1, l, h, 0x7351;
        }""",
        "=r,=r,r,r,r",
        [selector, low, high],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _entries_3(selector, low_0, low_1, high_0, high_1):
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 l, h;
        prmt.b32 l, $3, $4, $2;
        prmt.b32 h, $5, $6, $2;
        prmt.b32 $0, l, h, 0x5140;
        prmt.b32 $1, l, h, 0x7362;
        }""",
        "=r,=r,r,r,r,r,r",
        [selector, low_0, low_1, high_0, high_1],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _levels_2(selector, table):
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 l;
        prmt.b32 l, $3, $3, $2;
        prmt.b32 $0, l, 0x64646464, 0x4240;
        prmt.b32 $1, l, 0x64646464, 0x4341;
        }""",
        "=r,=r,r,r",
        [selector, table],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _levels_3(selector, table_0, table_1):
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 l;
        prmt.b32 l, $3, $4, $2;
        prmt.b32 $0, l, 0x64646464, 0x4140;
        prmt.b32 $1, l, 0x64646464, 0x4342;
        }""",
        "=r,=r,r,r,r",
        [selector, table_0, table_1],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _levels_4(selector, upper, table_0, table_1, table_2, table_3):
    # upper: bytes of ones where the fourth bit of a code is set.
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 l, h;
        prmt.b32 l, $4, $5, $2;
        prmt.b32 h, $6, $7, $2;
        lop3.b32 l, $3, l, h, 0xAC;
        prmt.b32 $0, l, 0x64646464, 0x4140;
        prmt.b32 $1, l, 0x64646464, 0x4342;
        }""",
        "=r,=r,r,r,r,r,r,r",
        [selector, upper, table_0, table_1, table_2, table_3],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _fourth_bits(words, PART: gl.constexpr):
    """Bytes 0x00 or 0xFF by the fourth bits of four nibbles, those of the low half first."""
    shifted = words << 4
    if PART == 0:
        chosen: gl.constexpr = "prmt.b32 $0, $1, $2, 0xD9C8;"
    else:
        chosen: gl.constexpr = "prmt.b32 $0, $1, $2, 0xFBEA;"
    return gl.inline_asm_elementwise(
        chosen, "=r,r,r", [shifted, words], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _to_levels(number):
    """``1024 + level`` to ``level``, two f16."""
    return gl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [number, -0x1BFF1C00], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def value_numbers(words, selector, table, PART: gl.constexpr, BITS: gl.constexpr):
    """``1024 + level`` of two subsets, two i32 that hold two f16 each."""
    if BITS == 2:
        first, second = _levels_2(selector, table[0])
    elif BITS == 3:
        first, second = _levels_3(selector, table[0], table[1])
    else:
        upper = _fourth_bits(words, PART)
        first, second = _levels_4(selector, upper, table[0], table[1], table[2], table[3])
    return first, second


@gluon.jit
def key_numbers(words, selector, table, PART: gl.constexpr, BITS: gl.constexpr):
    """Entries, or at 4 bits levels, of two subsets: two i32 that hold two f16 each."""
    if BITS == 2:
        first, second = _entries_2(selector, table[0], table[1])
    elif BITS == 3:
        first, second = _entries_3(selector, table[0], table[1], table[2], table[3])
    else:
        first, second = value_numbers(words, selector, table, PART, BITS)
        first = _to_levels(first)
        second = _to_levels(second)
    return first, second
