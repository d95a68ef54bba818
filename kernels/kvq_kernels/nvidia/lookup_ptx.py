"""PTX of the lookups (PTX ISA, prmt and lop3). ``$n`` are operands, outputs first.

``prmt d, a, b, c``: byte i of d is that of the eight bytes ``b:a`` which nibble i of c names, or,
where the nibble's top bit is set, the sign of that byte. ``lop3``: any function of three bits;
0xAC chooses the third operand where the first is set, else the second, and 0xE4 the first where the
third is set, else the second. Codes of the two neighbours of a word alternate; so do the f16 that
come out: ``0x5140`` and ``0x7362`` put low and high bytes of two numbers side by side.
"""

from __future__ import annotations

from typing import Final

from triton.experimental.gluon import language as gl

SPARE_WORDS: Final = gl.constexpr(
    "{ "
    ".reg .b32 s; "
    "shr.u32 s, $1, 1; "
    "lop3.b32 s, s, $2, 0x44444444, 0xE4; "
    "shr.u32 s, s, 1; "
    "lop3.b32 s, s, $3, 0x77777777, 0xE4; "
    "shr.u32 $0, s, 1; "
    "}"
)
"""$0: words of the fourth group at 3 bits, a bit too high; $1 to $3: words of three planes."""

ENTRIES_2: Final = gl.constexpr(
    "{ "
    ".reg .b32 l, h; "
    "prmt.b32 l, $3, $3, $2; "
    "prmt.b32 h, $4, $4, $2; "
    "prmt.b32 $0, l, h, 0x6240; "
    "prmt.b32 $1, l, h, 0x7351; "
    "}"
)
"""$0, $1: entries; $2: selector; $3: low bytes, $4: high bytes."""

ENTRIES_3: Final = gl.constexpr(
    "{ "
    ".reg .b32 l, h; "
    "prmt.b32 l, $3, $4, $2; "
    "prmt.b32 h, $5, $6, $2; "
    "prmt.b32 $0, l, h, 0x5140; "
    "prmt.b32 $1, l, h, 0x7362; "
    "}"
)
"""$0, $1: entries; $2: selector; $3, $4: low bytes, $5, $6: high bytes."""

LEVELS_2: Final = gl.constexpr(
    "{ "
    ".reg .b32 l; "
    "prmt.b32 l, $3, $3, $2; "
    "prmt.b32 $0, l, 0x64646464, 0x4240; "
    "prmt.b32 $1, l, 0x64646464, 0x4341; "
    "}"
)
"""$0, $1: 1024 + level; $2: selector; $3: levels."""

LEVELS_3: Final = gl.constexpr(
    "{ "
    ".reg .b32 l; "
    "prmt.b32 l, $3, $4, $2; "
    "prmt.b32 $0, l, 0x64646464, 0x4140; "
    "prmt.b32 $1, l, 0x64646464, 0x4342; "
    "}"
)
"""$0, $1: 1024 + level; $2: selector; $3, $4: levels."""

LEVELS_4: Final = gl.constexpr(
    "{ "
    ".reg .b32 l, h; "
    "prmt.b32 l, $4, $5, $2; "
    "prmt.b32 h, $6, $7, $2; "
    "lop3.b32 l, $3, l, h, 0xAC; "
    "prmt.b32 $0, l, 0x64646464, 0x4140; "
    "prmt.b32 $1, l, 0x64646464, 0x4342; "
    "}"
)
"""$0, $1: 1024 + level; $2: selector; $3: ones where a fourth bit is; $4 to $7: levels."""

FOURTH_BITS_LOW: Final = gl.constexpr("prmt.b32 $0, $1, $2, 0xD9C8;")
FOURTH_BITS_HIGH: Final = gl.constexpr("prmt.b32 $0, $1, $2, 0xFBEA;")
"""$0: the fourth bits of a half's four nibbles as bytes; $1: words << 4, $2: words."""

MINUS_1024: Final = gl.constexpr(
    "{ .reg .b32 minus; mov.b32 minus, 0xE400E400; add.rn.f16x2 $0, $1, minus; }"
)
"""$0: levels; $1: 1024 + level."""
