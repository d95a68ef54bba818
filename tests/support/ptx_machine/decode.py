"""Instructions to steps: what the modules of instructions share."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ptx_machine.slots import SPECIALS, Slots
from ptx_machine.syntax import Instruction, immediate
from ptx_machine.warp import LANES, RAW, Array, MachineError, Mask, Step, Warp

Handler = Callable[["Operands"], Step]
HANDLERS: dict[str, Handler] = {}


def instruction(*names: str) -> Callable[[Handler], Handler]:
    """Register what decodes instructions of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            assert name not in HANDLERS
            HANDLERS[name] = handler
        return handler

    return register


class Operands:
    """Operands and modifiers of one instruction. A handler takes all, or the rest is refused."""

    def __init__(self, instruction: Instruction, slots: Slots) -> None:
        self.instruction, self.slots = instruction, slots
        self.name, *self.modifiers = re.split(r"\.", instruction.opcode)
        self.operands = list(instruction.operands)

    def refuse(self, why: str) -> NotImplementedError:
        return NotImplementedError(f"{why}: {self.instruction}")

    def flag(self, name: str) -> bool:
        """Take a modifier if it is there."""
        if name in self.modifiers:
            self.modifiers.remove(name)
            return True
        return False

    def one_of(self, *names: str) -> str:
        """Take the first modifier, which has to be one of those."""
        if not self.modifiers or self.modifiers[0] not in names:
            raise self.refuse(f"expected one of {names}")
        return self.modifiers.pop(0)

    def optional(self, *names: str) -> str | None:
        """Take the first modifier if it is one of those."""
        return self.modifiers.pop(0) if self.modifiers and self.modifiers[0] in names else None

    def done(self, count: int) -> tuple[str, ...]:
        """Check that no modifier is left, and return the operands."""
        if self.modifiers:
            raise self.refuse(f"modifiers {self.modifiers}")
        if len(self.operands) != count:
            raise self.refuse(f"expected {count} operands")
        return tuple(self.operands)

    def find(self, text: str) -> tuple[int, int] | None:
        """Slot and bits of a register."""
        return self.slots.register(self.instruction.scope, text)

    def source(self, text: str, bits: int) -> int:
        """Slot of an operand that is read: a register of that width, constant, or address."""
        if found := self.find(text):
            if found[1] != bits:
                raise self.refuse(f"{text} has {found[1]} bits, not {bits}")
            return found[0]
        if SPECIALS.fullmatch(text):
            if bits != 32:
                raise self.refuse(f"{text} has 32 bits, not {bits}")
            return self.slots.special(text)
        number = self.slots.symbols.get(text)
        return self.slots.constant(immediate(text) if number is None else number, bits)

    def target(self, text: str, bits: int) -> int:
        """Slot of a register that is written; ``_`` is one that nobody reads."""
        if text == "_":
            return self.slots.add(np.zeros(LANES, RAW[bits]))
        if not (found := self.find(text)):
            raise self.refuse(f"{text} is not a register")
        if found[1] != bits:
            raise self.refuse(f"{text} has {found[1]} bits, not {bits}")
        return found[0]

    def number(self, text: str) -> int | None:
        """A constant, or None if the operand is something else."""
        if self.find(text) or SPECIALS.fullmatch(text) or text in self.slots.symbols:
            return None
        return immediate(text)

    def vector(self, text: str) -> list[str]:
        """Elements of ``{a, b}``; one of anything else."""
        return [one.strip() for one in text.strip("{}").split(",")]

    def address(self, text: str) -> tuple[str, int]:
        """Base and offset of ``[base + offset]``."""
        found = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?\s*\]", text)
        if not found:
            raise self.refuse(f"address {text}")
        return found[1], immediate((found[2] or found[3] or "0").replace(" ", ""))


def assign(function: Callable[..., Array], target: int, *sources: int) -> Step:
    """A step that puts a function of its sources into a slot."""
    where = np.where
    if len(sources) == 1:
        (a,) = sources

        def one(warp: Warp, mask: Mask) -> None:
            R = warp.values
            value = function(R[a])
            R[target] = value if mask is None else where(mask, value, R[target])

        return one
    if len(sources) == 2:
        a, b = sources

        def two(warp: Warp, mask: Mask) -> None:
            R = warp.values
            value = function(R[a], R[b])
            R[target] = value if mask is None else where(mask, value, R[target])

        return two

    def several(warp: Warp, mask: Mask) -> None:
        R = warp.values
        value = function(*[R[source] for source in sources])
        R[target] = value if mask is None else where(mask, value, R[target])

    return several


def need_all(operands: Operands, mask: Mask) -> None:
    """An ``.aligned`` instruction is one for all threads of a warp."""
    if mask is not None:
        raise MachineError(f"only threads {np.flatnonzero(mask)} run {operands.instruction}")
