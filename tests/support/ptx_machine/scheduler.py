"""Which warp runs when, and which of its threads.

Each warp of a CTA runs to its next barrier, or its end, before another one starts. Threads of a
warp that take different ways at a branch wait for each other: those at the lowest place of the
program run first, so that all are together again behind an ``if`` or a loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ptx_machine.memory import MemoryAccessError
from ptx_machine.program import Block, End
from ptx_machine.race import RaceError
from ptx_machine.warp import ENDED, LANES, MachineError, Mask, Warp


class Scheduler:
    """Runs CTAs over the blocks of a program; counts how often warps run each."""

    def __init__(self, blocks: list[Block], limit: int) -> None:
        self.blocks, self.limit = blocks, limit
        self.visits: Counter[int] = Counter()

    def run(self, warps: Sequence[Warp]) -> None:
        """Run a CTA to its end."""
        while not all(warp.ended for warp in warps):
            for warp in warps:
                if not warp.ended and warp.waiting is None:
                    self.advance(warp)
            _release(warps)

    def advance(self, warp: Warp) -> None:
        """Run a warp to its next barrier, or its end."""
        for _ in range(self.limit):
            mask: Mask = None
            if warp.blocks is not None:
                lowest = int(warp.blocks.min())
                if lowest == ENDED:
                    warp.ended = True
                    return
                mask, warp.block = warp.blocks == lowest, lowest
                if mask.all():
                    warp.blocks = mask = None
            block = self.blocks[warp.block]
            self.visits[warp.block] += 1
            self._steps(block, warp, mask)
            _leave(warp, block.end, mask)
            if warp.waiting is not None or warp.ended:
                return
        raise MachineError(f"a loop without an end at {self.blocks[warp.block].end.instruction}")

    @staticmethod
    def _steps(block: Block, warp: Warp, mask: Mask) -> None:
        place = 0
        try:
            for step in block.steps:
                step(warp, mask)
                place += 1
        except (MachineError, MemoryAccessError, NotImplementedError, RaceError):
            raise
        except Exception as error:
            raise RuntimeError(f"the machine failed at {block.instructions[place]}") from error


def _release(warps: Sequence[Warp]) -> None:
    """Let warps go on whose barrier all have reached."""
    living = [warp for warp in warps if not warp.ended]
    released = not living
    for barrier in {warp.waiting.barrier for warp in living if warp.waiting is not None}:
        there = [w for w in living if w.waiting is not None and w.waiting.barrier == barrier]
        if len(there) == (barrier[1] // LANES if barrier[1] else len(living)):
            released = True
            passed = 1 + max(warp.now.barriers for warp in there)
            for warp in there:
                warp.waiting = None
                warp.now = warp.now._replace(barriers=passed)
    if not released:
        places = {str(warp.waiting and warp.waiting.instruction) for warp in living}
        raise MachineError(f"warps wait for each other at {sorted(places)}")


def _leave(warp: Warp, end: End, mask: Mask) -> None:
    """Move the threads that ran a block behind it."""
    after = warp.block + 1
    if end.kind == "barrier":
        if mask is not None and (mask != warp.alive).any():
            raise MachineError(f"only threads {np.flatnonzero(mask)} reach {end.instruction}")
        warp.waiting = end
    elif end.kind != "next":
        goal = end.target if end.kind == "branch" else ENDED
        if end.guard is None:
            after = goal
        else:
            chosen = warp.values[end.guard]
            chosen = ~chosen if end.negated else chosen
            taken = np.count_nonzero(chosen if mask is None else chosen & mask)
            if taken == (LANES if mask is None else np.count_nonzero(mask)):
                after = goal
            elif taken:
                places = np.where(chosen, goal, after)
                before = places if warp.blocks is None else warp.blocks
                warp.blocks = places if mask is None else np.where(mask, places, before)
                return
    if mask is not None and warp.blocks is not None:
        warp.blocks = np.where(mask, after, warp.blocks)
    elif after == ENDED:
        warp.ended = True
    else:
        warp.block = after
