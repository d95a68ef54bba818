"""Moves: ``mov``, ``cvta`` (PTX ISA 8.7, 9.7.9 "Data movement")."""

from __future__ import annotations

from ptx_machine.decode import Operands, instruction
from ptx_machine.syntax import BITS
from ptx_machine.warp import RAW, Array, Mask, Step, Warp, write


@instruction("mov")
def mov(operands: Operands) -> Step:
    """A value; or one of several halves packed, or unpacked."""
    bits = BITS[operands.one_of(*BITS)]
    to, of = operands.done(2)
    if to.startswith("{"):
        return _unpack(operands, operands.vector(to), operands.source(of, bits), bits)
    target = operands.target(to, bits)
    if of.startswith("{"):
        return _pack(operands, target, operands.vector(of), bits)
    source = operands.source(of, bits)

    def step(warp: Warp, mask: Mask) -> None:
        write(warp, mask, target, warp.values[source])

    return step


def _unpack(operands: Operands, parts: list[str], source: int, bits: int) -> Step:
    width = bits // len(parts)
    if width not in RAW or width * len(parts) != bits:
        raise operands.refuse("parts of another width")
    shifts = [
        (operands.target(part, width), RAW[bits](place * width))
        for place, part in enumerate(parts)
        if part != "_"
    ]
    kind = RAW[width]

    def step(warp: Warp, mask: Mask) -> None:
        value = warp.values[source]
        for target, shift in shifts:
            write(warp, mask, target, (value >> shift if shift else value).astype(kind))

    return step


def _pack(operands: Operands, target: int, parts: list[str], bits: int) -> Step:
    width = bits // len(parts)
    if width not in RAW or width * len(parts) != bits:
        raise operands.refuse("parts of another width")
    first, *others = (operands.source(part, width) for part in parts)
    kind = RAW[bits]
    shifts = [(other, kind((place + 1) * width)) for place, other in enumerate(others)]

    def step(warp: Warp, mask: Mask) -> None:
        R = warp.values
        value: Array = R[first].astype(kind)
        for source, shift in shifts:
            value |= R[source].astype(kind) << shift
        write(warp, mask, target, value)

    return step


@instruction("cvta")
def cvta(operands: Operands) -> Step:
    """Generic addresses are those of global memory here; other spaces are refused."""
    operands.flag("to")
    operands.one_of("global")
    operands.modifiers.insert(0, operands.one_of("u64"))
    return mov(operands)


@instruction("fence", "membar")
def fence(operands: Operands) -> Step:
    """Nothing: accesses take effect in order."""
    operands.modifiers.clear()
    operands.done(0)
    return lambda warp, mask: None
