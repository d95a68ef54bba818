"""What PTX text is made of: types, scopes, instructions, constants (PTX ISA 8.7, 4 and 5)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
"""Width of a type; predicates count as one bit."""


@dataclass(eq=False)
class Scope:
    """Registers and labels that a pair of braces declares.

    Fields:
        widths: bits of each register declared by name.
        families: bits and number of registers declared as ``%r<10>``.
        labels: index of the instruction behind each label.
    """

    parent: Scope | None = None
    widths: dict[str, int] = field(default_factory=dict)
    families: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def around(self) -> Iterator[Scope]:
        """This scope, then those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def width(self, name: str) -> int | None:
        """Bits of a register that this scope itself declares."""
        if name in self.widths:
            return self.widths[name]
        if found := re.fullmatch(r"(.*?)(\d+)", name):
            bits, count = self.families.get(found[1], (0, 0))
            return bits if int(found[2]) < count else None
        return None

    def target(self, label: str) -> int:
        """Index of the instruction behind a label."""
        for scope in self.around():
            if label in scope.labels:
                return scope.labels[label]
        raise NotImplementedError(f"no label {label}")


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard opcode operands;``, operands as they are written."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    scope: Scope
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def immediate(text: str) -> int:
    """A constant: an integer, or the bits of a float (PTX ISA 8.7, 4.5 "Constants").

    Raises:
        NotImplementedError: It is something else.
    """
    text = text.strip()
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return int(found[1] or found[2], 16)
    if not (found := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)):
        raise NotImplementedError(f"operand {text}")
    digits = found[2]
    octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
    return int(found[1] + digits, 8 if octal else 0)


def float_bits(number: float, kind: str) -> int:
    """Bits of a number as ``f16``, ``f32`` or ``f64``."""
    form = {"f16": "<e", "f32": "<f", "f64": "<d"}[kind]
    return int.from_bytes(struct.pack(form, number), "little")
