"""Asynchronous copies from global to shared memory (PTX ISA 8.7, 9.7.9.25.3).

What is copied arrives when its group is waited for, and not before, so that a kernel that does not
wait reads what was there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx_machine.accesses import locate
from ptx_machine.decode import Operands, instruction, need_all
from ptx_machine.warp import Array, Mask, Step, Warp, note


@instruction("cp")
def cp(operands: Operands) -> Step:
    """``cp.async`` without barriers or bulks."""
    operands.one_of("async")
    if operands.flag("commit_group"):
        operands.done(0)
        return _commit(operands)
    if operands.flag("wait_group"):
        (text,) = operands.done(1)
        left = operands.number(text)
        if left is None:
            raise operands.refuse("groups")
        return _wait(operands, left, everything=False)
    if operands.flag("wait_all"):
        operands.done(0)
        return _wait(operands, 0, everything=True)
    operands.one_of("ca", "cg")
    operands.one_of("shared", "shared::cta")
    operands.one_of("global")
    for modifier in list(operands.modifiers):
        if modifier in ("L2::64B", "L2::128B", "L2::256B"):
            operands.modifiers.remove(modifier)
    to, of, size, *more = operands.done(len(operands.operands))
    count = operands.number(size)
    if count not in (4, 8, 16) or len(more) > 1:
        raise operands.refuse("size")
    return _copy(operands, to, of, count, more[0] if more else size)


@instruction("prefetch")
def prefetch(operands: Operands) -> Step:
    """Fetches nothing, but the address must be one that could be loaded from."""
    operands.one_of("global")
    operands.one_of("L1", "L2")
    (address,) = operands.done(1)
    source = locate(operands, "global", address, 4, store=False, races=False)

    def step(warp: Warp, mask: Mask) -> None:
        source(warp, mask)

    return step


def _copy(operands: Operands, to: str, of: str, size: int, taken: str) -> Step:
    """A copy of ``size`` bytes, zeros behind those that are taken."""
    goal = locate(operands, "shared", to, size, store=True)
    source = locate(operands, "global", of, size, store=False)
    limit = operands.source(taken, 32)

    def step(warp: Warp, mask: Mask) -> None:
        addresses, _ = goal(warp, mask)
        lanes = np.arange(32) if mask is None else np.flatnonzero(mask)
        lengths = warp.values[limit][lanes]
        data = np.zeros((len(lanes), size), np.uint8)
        wanted = lengths > 0
        if ((lengths != 0) & (lengths != size)).any():
            raise operands.refuse("a part of a copy")
        if wanted.any():
            chosen = np.zeros(32, np.bool_)
            chosen[lanes[wanted]] = True
            places, regions = source(warp, None if chosen.all() else chosen)
            loaded = np.empty((len(places), size // 4), np.uint32)
            for region, part in regions:
                loaded[part] = (
                    np.atleast_2d(region.load(places[part], 4, 1)[:, None])
                    if (size == 4)
                    else region.load(places[part], 4, size // 4).T
                )
            data[wanted] = loaded.view(np.uint8)
        _open(warp).append((addresses, lanes, data.view(np.uint32)))

    return step


def _open(warp: Warp) -> list[tuple[Array, Array, Array]]:
    """The group that copies, addresses and lanes and words, are added to: the last one."""
    if not warp.pending:
        warp.pending.append([])
    found: list[tuple[Array, Array, Array]] = warp.pending[-1]
    return found


def _commit(operands: Operands) -> Step:
    def step(warp: Warp, mask: Mask) -> None:
        need_all(operands, mask)
        _open(warp)
        warp.pending.append([])

    return step


def _wait(operands: Operands, left: int, *, everything: bool) -> Step:
    def step(warp: Warp, mask: Mask) -> None:
        need_all(operands, mask)
        _open(warp)
        # The last group is still open.
        done = len(warp.pending) if everything else max(0, len(warp.pending) - 1 - left)
        arriving: list[Any] = [copy for group in warp.pending[:done] for copy in group]
        del warp.pending[:done]
        for addresses, lanes, words in arriving:
            what, size = operands.instruction, 4 * words.shape[1]
            note(warp, warp.shared, addresses, size, lanes, what, store=True)
            columns = [words[:, column] for column in range(words.shape[1])]
            warp.shared.store(addresses, 4, columns, warp.backward)

    return step
