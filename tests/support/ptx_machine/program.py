"""A kernel as blocks of steps, which end where threads may go different ways."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

# Modules of instructions register what they know.
from ptx_machine import (  # noqa: F401
    accesses,
    arithmetic,
    atomics,
    bits,
    compare,
    convert,
    copies,
    exchange,
    float_arithmetic,
    matrix,
    matrix_moves,
    moves,
    warpgroup,
)
from ptx_machine.decode import HANDLERS, Operands
from ptx_machine.memory import GlobalMemory
from ptx_machine.parse import Kernel, parse
from ptx_machine.slots import Slots
from ptx_machine.syntax import BITS, Instruction
from ptx_machine.warp import LANES, RAW, SHARED_BASE, Mask, Step, Warp

_ENDS = ("bra", "ret", "exit", "bar", "barrier")


def _name(instruction: Instruction) -> str:
    name, _, modifiers = instruction.opcode.partition(".")
    # Of a warp, and without an end to it
    return "bar.warp" if name == "bar" and modifiers.startswith("warp.") else name


@dataclass(frozen=True)
class End:
    """What threads do behind a block.

    Fields:
        kind: ``next``, ``branch``, ``exit`` or ``barrier``.
        target: block that a branch goes to.
        guard: slot of the predicate of threads that do it, the others go on; None for all.
        negated: those without the predicate do it.
        barrier: number of the barrier, and threads that it waits for; 0 for all.
    """

    kind: str
    instruction: Instruction | None = None
    target: int = 0
    guard: int | None = None
    negated: bool = False
    barrier: tuple[int, int] = (0, 0)


@dataclass
class Block:
    """Steps without a branch in between, the instructions that they come from, and an end."""

    steps: list[Step] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    end: End = field(default_factory=lambda: End("next"))

    def opcodes(self) -> Counter[str]:
        counts = Counter(one.opcode for one in self.instructions)
        if self.end.instruction is not None:
            counts[self.end.instruction.opcode] += 1
        return counts


@dataclass(frozen=True)
class Program:
    """A kernel ready to run.

    Fields:
        shared_bytes: of all that the module itself declares, before what a launch asks for.
        data: constant data, held here.
    """

    kernel: Kernel
    slots: Slots
    blocks: list[Block]
    shared_bytes: int
    data: GlobalMemory


@lru_cache(maxsize=64)
def load(text: str) -> Program:
    """Decode PTX.

    Raises:
        NotImplementedError: Something in it is not known.
    """
    kernel = parse(text)
    data = GlobalMemory()
    symbols = {name: data.add_data(name, raw) for name, raw in kernel.data.items()}
    used = 0
    # Those that a launch sizes share what comes behind all others.
    for name, size in sorted(kernel.shared.items(), key=lambda item: item[1] is None):
        symbols[name] = SHARED_BASE + used
        used += -(-(size or 0) // 16) * 16
    slots = Slots(symbols)
    for name, kind in kernel.parameters:
        raw = RAW[max(16, BITS[kind])]
        slots.parameters[name] = slots.add(np.zeros(LANES, raw)), kind
    return Program(kernel, slots, _blocks(kernel, slots), used, data)


def _blocks(kernel: Kernel, slots: Slots) -> list[Block]:
    instructions = kernel.instructions
    names = [_name(instruction) for instruction in instructions]
    starts = {0, *(i + 1 for i, name in enumerate(names) if name in _ENDS)}
    for instruction in instructions:
        for scope in instruction.scope.around():
            starts.update(scope.labels.values())
    ordered = sorted(start for start in starts if start < len(instructions))
    numbers = {start: number for number, start in enumerate(ordered)}
    # A label behind the last instruction: nothing is left to do there.
    numbers[len(instructions)] = len(ordered)
    blocks = []
    for start, stop in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        block = Block()
        for instruction, name in zip(instructions[start:stop], names[start:stop], strict=True):
            if name in _ENDS:
                block.end = _end(instruction, slots, numbers)
            else:
                block.steps.append(_step(instruction, slots))
                block.instructions.append(instruction)
        blocks.append(block)
    blocks.append(Block(end=End("exit")))
    return blocks


def _guard(instruction: Instruction, slots: Slots) -> tuple[int | None, bool]:
    if instruction.guard is None:
        return None, False
    found = slots.register(instruction.scope, instruction.guard.lstrip("!"))
    if found is None or found[1] != 1:
        raise NotImplementedError(f"guard: {instruction}")
    return found[0], instruction.guard.startswith("!")


def _end(instruction: Instruction, slots: Slots, numbers: dict[int, int]) -> End:
    guard, negated = _guard(instruction, slots)
    operands = Operands(instruction, slots)
    if operands.name == "bra":
        operands.flag("uni")
        (label,) = operands.done(1)
        target = numbers[instruction.scope.target(label)]
        return End("branch", instruction, target, guard, negated)
    if operands.name in ("ret", "exit"):
        operands.flag("uni")
        operands.done(0)
        return End("exit", instruction, guard=guard, negated=negated)
    operands.flag("cta")
    operands.one_of("sync")
    operands.flag("aligned")
    texts = operands.done(len(operands.operands))
    found = [operands.number(text) for text in texts]
    if guard is not None or len(found) not in (1, 2) or None in found:
        raise operands.refuse("barrier")
    known = [number or 0 for number in found]
    return End("barrier", instruction, barrier=(known[0], known[1] if len(known) > 1 else 0))


def _step(instruction: Instruction, slots: Slots) -> Step:
    operands = Operands(instruction, slots)
    name = _name(instruction)
    if name not in HANDLERS:
        raise operands.refuse("unknown instruction")
    try:
        step = HANDLERS[name](operands)
    except NotImplementedError as error:
        if str(instruction) in str(error):
            raise
        raise operands.refuse(str(error)) from error
    guard, negated = _guard(instruction, slots)
    return step if guard is None else _guarded(step, guard, negated)


def _guarded(step: Step, guard: int, negated: bool) -> Step:
    count = np.count_nonzero

    def guarded(warp: Warp, mask: Mask) -> None:
        chosen = warp.values[guard]
        if negated:
            chosen = ~chosen
        if mask is not None:
            chosen = chosen & mask
        found = count(chosen)
        if found == LANES:
            step(warp, None)
        elif found:
            step(warp, chosen)

    return guarded
