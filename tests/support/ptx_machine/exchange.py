"""Threads of a warp among each other (PTX ISA 8.7, 9.7.9.6, 9.7.13).

All threads that a member mask names have to be there, but for those that have ended.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.decode import Operands, instruction
from ptx_machine.warp import LANES, Array, MachineError, Mask, Step, Warp, write

U32 = np.uint32
_LANE = np.arange(LANES)
_BIT = U32(1) << _LANE.astype(U32)


def members(operands: Operands, text: str) -> Callable[[Warp, Mask], Array]:
    """What gives the threads, bool ``[32]``, that a member mask names and that run.

    Raises:
        MachineError: Threads name different ones, or not all of them run.
    """
    source = operands.source(text, 32)
    constant = operands.number(text)
    if constant is not None and constant & 0xFFFFFFFF == 0xFFFFFFFF:
        everyone = np.ones(LANES, np.bool_)

        def all_of_them(warp: Warp, mask: Mask) -> Array:
            if mask is None:
                return everyone
            if (mask != warp.alive).any():
                raise MachineError(
                    f"only threads {np.flatnonzero(mask)} run {operands.instruction}"
                )
            return mask

        return all_of_them

    def some(warp: Warp, mask: Mask) -> Array:
        running = np.ones(LANES, np.bool_) if mask is None else mask
        masks = warp.values[source][running]
        named = (masks[0] & _BIT) != 0
        if (masks != masks[0]).any() or (running & ~named).any():
            raise MachineError(f"threads outside of their member mask run {operands.instruction}")
        if (named & warp.alive & ~running).any():
            raise MachineError(f"only threads {np.flatnonzero(running)} run {operands.instruction}")
        return running

    return some


@instruction("bar.warp")
def bar_warp(operands: Operands) -> Step:
    """Threads of a warp come together: here they have."""
    operands.one_of("warp")
    operands.one_of("sync")
    (who,) = operands.done(1)
    named = members(operands, who)

    def step(warp: Warp, mask: Mask) -> None:
        named(warp, mask)
        warp.now = warp.now._replace(warp_barriers=warp.now.warp_barriers + 1)

    return step


@instruction("shfl")
def shfl(operands: Operands) -> Step:
    """A value of another thread of a segment, and whether there was one.

    Where it comes from a thread that does not run it is undefined: ones here.
    """
    operands.one_of("sync")
    mode = operands.one_of("up", "down", "bfly", "idx")
    operands.one_of("b32")
    to, a, b, c, who = operands.done(5)
    names = [one.strip() for one in to.split("|")]
    target = operands.target(names[0], 32)
    found = operands.target(names[1], 1) if len(names) > 1 else None
    source, by, clamp = (operands.source(one, 32) for one in (a, b, c))
    named = members(operands, who)
    constant = operands.number(b) is not None and operands.number(c) is not None

    def places(offset: Array, limits: Array) -> tuple[Array, Array]:
        bits = offset, limits >> U32(8), limits
        offset, segment, edge = ((x & U32(31)).astype(np.int64) for x in bits)
        last = (_LANE & segment) | (edge & ~segment)
        place = {
            "up": _LANE - offset,
            "down": _LANE + offset,
            "bfly": _LANE ^ offset,
            "idx": (_LANE & segment) | (offset & ~segment),
        }[mode]
        inside = place >= last if mode == "up" else place <= last
        return np.where(inside, place, _LANE), inside

    fixed: list[tuple[Array, Array]] = []

    def step(warp: Warp, mask: Mask) -> None:
        R = warp.values
        running = named(warp, mask)
        if fixed:
            place, inside = fixed[0]
        else:
            place, inside = places(R[by], R[clamp])
            if constant:
                fixed.append((place, inside))
        value = R[source][place]
        if mask is not None:
            value = np.where(running[place], value, U32(0xFFFFFFFF))
        write(warp, mask, target, value)
        if found is not None:
            write(warp, mask, found, inside)

    return step


@instruction("vote")
def vote(operands: Operands) -> Step:
    operands.one_of("sync")
    mode = operands.one_of("ballot", "any", "all", "uni")
    kind = operands.one_of("b32" if mode == "ballot" else "pred")
    to, of, who = operands.done(3)
    target = operands.target(to, 32 if kind == "b32" else 1)
    negated = of.startswith("!")
    source, named = operands.source(of.lstrip("!"), 1), members(operands, who)

    def step(warp: Warp, mask: Mask) -> None:
        running = named(warp, mask)
        votes = warp.values[source] ^ negated
        yes = votes[running]
        if mode == "ballot":
            write(warp, mask, target, np.full(LANES, _BIT[votes & running].sum(dtype=U32)))
            return
        result = {"any": yes.any(), "all": yes.all(), "uni": yes.all() or not yes.any()}[mode]
        write(warp, mask, target, np.full(LANES, bool(result)))

    return step


@instruction("activemask")
def activemask(operands: Operands) -> Step:
    operands.one_of("b32")
    (to,) = operands.done(1)
    target = operands.target(to, 32)

    def step(warp: Warp, mask: Mask) -> None:
        bits = _BIT.sum(dtype=U32) if mask is None else _BIT[mask].sum(dtype=U32)
        write(warp, mask, target, np.full(LANES, bits))

    return step


@instruction("match")
def match(operands: Operands) -> Step:
    """Threads that hold the same value."""
    operands.one_of("any")
    operands.one_of("sync")
    bits = int(operands.one_of("b32", "b64")[1:])
    to, of, who = operands.done(3)
    target, source = operands.target(to, 32), operands.source(of, bits)
    named = members(operands, who)

    def step(warp: Warp, mask: Mask) -> None:
        running = named(warp, mask)
        value = warp.values[source]
        same = (value[:, None] == value) & running
        write(warp, mask, target, np.where(same, _BIT, U32(0)).sum(axis=1, dtype=U32))

    return step


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux")
def redux(operands: Operands) -> Step:
    """One number of all threads."""
    operands.one_of("sync")
    name = operands.one_of(*_REDUCTIONS)
    kind = operands.one_of(*(("u32", "s32") if name in ("add", "min", "max") else ("b32",)))
    to, of, who = operands.done(3)
    target, source, named = operands.target(to, 32), operands.source(of, 32), members(operands, who)
    dtype = np.dtype(np.int32 if kind == "s32" else U32)

    def step(warp: Warp, mask: Mask) -> None:
        taken = warp.values[source][named(warp, mask)].view(dtype)
        result = _REDUCTIONS[name].reduce(taken, dtype=dtype)
        write(warp, mask, target, np.full(LANES, result, dtype).view(U32))

    return step
