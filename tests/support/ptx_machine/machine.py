"""The machine: CTAs one after another, their warps one after another between barriers.

The warps of a CTA do not take turns: each runs to the next barrier, or its end, before the next one
starts, in the order asked for. A kernel that lacks a barrier between a store to shared memory and a
load by another warp therefore computes one thing forward and another backward (or reads memory that
nobody wrote, which is NaN). Of several threads of a warp that store to one place at once, the last
one wins forward, the first one backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Literal

import numpy as np
from torch import Tensor

from ptx_machine.memory import GlobalMemory, shared_memory
from ptx_machine.parse import Kernel
from ptx_machine.program import Program, load
from ptx_machine.race import Moment
from ptx_machine.scheduler import Scheduler
from ptx_machine.slots import Slots
from ptx_machine.syntax import BITS, float_bits
from ptx_machine.warp import LANES, RAW, SHARED_BASE, Array, Warp

Order = Literal["forward", "backward"]
Argument = Tensor | int | float
SCRATCH_PARAMETERS = 2
"""What Triton adds to the arguments of a kernel: addresses of scratch memory."""


def run(
    ptx: str,
    *,
    grid: Sequence[int],
    threads: int,
    arguments: Sequence[Argument],
    shared_bytes: int,
    order: Order = "forward",
    names: Sequence[str] = (),
    read_only: Sequence[Tensor] = (),
    limit: int = 1_000_000,
    races: bool = True,
) -> Counter[str]:
    """Run the kernel of a module on tensors in place.

    Args:
        ptx: a module with one entry.
        grid: CTAs along x, and y and z.
        threads: of a CTA, a multiple of 32.
        arguments: of the kernel, in order; the two scratch addresses that Triton appends may be
            left out. A tensor on the CPU stands for its address, and may be touched from its first
            to its last element.
        shared_bytes: that the launch asks for.
        order: of CTAs, of warps between barriers, and of threads that store to one place.
        names: of the arguments, for messages.
        read_only: tensors that must not be stored to.
        limit: blocks that a warp may run between barriers, so that a loop without an end is found.
        races: look for accesses that no barrier puts in order (``ptx_machine.race``).

    Returns: how many instructions warps issued, by opcode.

    Raises:
        NotImplementedError: Something in the module is not known.
        MemoryAccessError: A touch outside of all tensors, or misaligned.
        MachineError: A barrier that not all threads reach, and the like.
        RaceError: Two threads touch one byte, one of them stores, and no barrier orders them.
    """
    program = load(ptx)
    if threads % LANES:
        raise ValueError(f"{threads} threads are no whole warps")
    if program.kernel.threads not in (None, threads):
        raise ValueError(f"the kernel is one for {program.kernel.threads} threads, not {threads}")
    grid = (*grid, 1, 1)[:3]
    memory = GlobalMemory()
    memory.regions += program.data.regions
    values = list(program.slots.initial)
    _set_parameters(program, values, memory, arguments, names, read_only)
    backward = order == "backward"
    runner = Scheduler(program.blocks, limit)
    ctas = list(product(*(range(count) for count in reversed(grid))))
    with np.errstate(all="ignore"):
        for cta, (z, y, x) in enumerate(reversed(ctas) if backward else ctas, 1):
            shared = shared_memory(program.shared_bytes + shared_bytes, SHARED_BASE)
            warps = []
            for number in range(threads // LANES):
                own = list(values)
                _set_specials(program.slots, own, (x, y, z), grid, threads, number)
                now = Moment(cta, number, 0, 0)
                warps.append(Warp(own, memory, shared, backward, races=races, now=now))
            runner.run(warps[::-1] if backward else warps)
    counts: Counter[str] = Counter()
    for block, times in runner.visits.items():
        for opcode, count in program.blocks[block].opcodes().items():
            counts[opcode] += count * times
    return counts


def _set_parameters(
    program: Program,
    values: list[Array],
    memory: GlobalMemory,
    arguments: Sequence[Argument],
    names: Sequence[str],
    read_only: Sequence[Tensor],
) -> None:
    kernel: Kernel = program.kernel
    missing = len(kernel.parameters) - len(arguments)
    if missing not in (0, SCRATCH_PARAMETERS):
        wanted = ", ".join(kind for _, kind in kernel.parameters)
        raise ValueError(f"{len(arguments)} arguments for parameters {wanted}")
    given = [*arguments, *[0] * missing]
    names = [*names, *(name for name, _ in kernel.parameters[len(names) :])]
    for (parameter, kind), name, value in zip(kernel.parameters, names, given, strict=True):
        slot, _ = program.slots.parameters[parameter]
        if isinstance(value, Tensor):
            if BITS[kind] != 64:
                raise ValueError(f"{name} is {kind}, not a tensor")
            writable = not any(value is tensor for tensor in read_only)
            number = memory.add_tensor(name, value, writable=writable)
        elif kind[0] == "f":
            number = float_bits(float(value), kind)
        elif isinstance(value, float):
            raise ValueError(f"{name} is {kind}, not {value}")
        else:
            low = -(1 << (BITS[kind] - 1))
            if not low <= value < 1 << BITS[kind]:
                raise ValueError(f"{name} is {kind}, which {value} does not fit")
            number = value & ((1 << BITS[kind]) - 1)
        values[slot] = np.full(LANES, number, RAW[max(16, BITS[kind])])


def _set_specials(
    slots: Slots,
    values: list[Array],
    place: Sequence[int],
    grid: Sequence[int],
    threads: int,
    warp: int,
) -> None:
    """Special registers of a warp (PTX ISA 8.7, 10)."""
    lane = np.arange(LANES, dtype=np.uint32)
    known: dict[str, Array | int] = {
        "%laneid": lane, "%warpid": warp, "%nwarpid": threads // LANES,
        "%lanemask_eq": 1 << lane, "%lanemask_lt": (1 << lane) - 1,
        "%lanemask_le": (2 << lane.astype(np.uint64)) - 1,
    }  # fmt: skip
    for axis, index, count in zip("xyz", place, grid, strict=True):
        known[f"%ctaid.{axis}"], known[f"%nctaid.{axis}"] = index, count
        known[f"%tid.{axis}"] = LANES * warp + lane if axis == "x" else 0
        known[f"%ntid.{axis}"] = threads if axis == "x" else 1
    for name, slot in slots.specials.items():
        if name not in known:
            raise NotImplementedError(name)
        values[slot] = np.broadcast_to(known[name], LANES).astype(np.uint32)
