"""Where everything lies in a warp's list of values (``ptx_machine.warp``)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from ptx_machine.syntax import Scope
from ptx_machine.warp import LANES, RAW, Array

SPECIALS = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|nwarpid)|%lanemask_\w\w")


@dataclass
class Slots:
    """Where everything lies in a warp's list of values.

    Fields:
        initial: values that a warp begins with; registers are full of ones: NaN as a float.
        symbols: addresses by name.
        specials: slots to be filled at a launch, by name.
        parameters: slots to be filled at a launch, and types, by name.
    """

    symbols: dict[str, int]
    initial: list[Array] = field(default_factory=list)
    specials: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, tuple[int, str]] = field(default_factory=dict)
    registers: dict[tuple[Scope, str], tuple[int, int]] = field(default_factory=dict)
    constants: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, value: Array) -> int:
        value.flags.writeable = False
        self.initial.append(value)
        return len(self.initial) - 1

    def register(self, scope: Scope, name: str) -> tuple[int, int] | None:
        """Slot and bits of a register that is seen from a scope."""
        for one in scope.around():
            if (one, name) in self.registers:
                return self.registers[one, name]
            if bits := one.width(name):
                ones: Array = np.full(LANES, -1).astype(RAW[bits])
                self.registers[one, name] = self.add(ones), bits
                return self.registers[one, name]
        return None

    def constant(self, number: int, bits: int) -> int:
        number = bool(number) if bits == 1 else number & ((1 << bits) - 1)
        if (number, bits) not in self.constants:
            self.constants[number, bits] = self.add(np.full(LANES, number, RAW[bits]))
        return self.constants[number, bits]

    def special(self, name: str) -> int:
        if name not in self.specials:
            self.specials[name] = self.add(np.zeros(LANES, np.uint32))
        return self.specials[name]
