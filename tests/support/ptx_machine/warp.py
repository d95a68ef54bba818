"""A warp: 32 threads and what they hold.

All values of a warp are arrays of its 32 threads, raw bits: bool for predicates, else uint16,
uint32 or uint64. They lie in one list, by *slot*: registers, then constants, special registers and
parameters, so that a step reads every operand alike. Arrays are never written to: an instruction
puts another one into the slot. They are contiguous, so that they can be viewed as any type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_machine.memory import GlobalMemory, Region
from ptx_machine.race import SEVERAL, Moment

LANES = 32
Array = np.ndarray[Any, np.dtype[Any]]
Mask = Array | None
"""Threads that take part, bool ``[32]``; None for all."""

RAW = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SHARED_BASE = 1024
"""Address of the first byte of shared memory: 0 is none."""


class MachineError(RuntimeError):
    """The program did something that the ISA leaves undefined or forbids."""


ENDED = np.iinfo(np.int64).max
"""Block of threads that have ended."""


@dataclass
class Warp:
    """32 threads.

    Fields:
        values: by slot.
        memory, shared: what they can touch.
        backward: of threads that store to one place at once the first one wins.
        pending: groups of copies on their way, the last one still open.
        block: where all threads are, if they are together.
        blocks: where each is, int64 ``[32]``; None while they are together.
        waiting: where a barrier holds them.
        races: whether accesses that no barrier puts in order are looked for.
        now: which warp this is, and how many barriers it has passed.
    """

    values: list[Array]
    memory: GlobalMemory
    shared: Region
    backward: bool
    pending: list[Any] = field(default_factory=list)
    block: int = 0
    blocks: Array | None = None
    waiting: Any = None
    ended: bool = False
    races: bool = False
    now: Moment = Moment(1, 0, 0, 0)  # noqa: RUF009

    @property
    def alive(self) -> Array:
        """Threads that have not ended."""
        return np.ones(LANES, np.bool_) if self.blocks is None else self.blocks != ENDED


Step = Callable[[Warp, Mask], None]


def write(warp: Warp, mask: Mask, target: int, value: Array) -> None:
    """Put a value into a slot, for the threads of a mask."""
    R = warp.values
    R[target] = value if mask is None else np.where(mask, value, R[target])


def note(
    warp: Warp,
    region: Region,
    addresses: Array,
    size: int,
    lanes: Array | None,
    what: object,
    *,
    store: bool,
) -> None:
    """Look for races of an access that has been checked; without lanes any may touch each address.

    Raises:
        RaceError: There is one.
    """
    if not (warp.races and region.writable and len(addresses)):
        return
    several = np.full(len(addresses), SEVERAL)
    threads = several if lanes is None else LANES * warp.now.warp + lanes
    touch = region.shadow.store if store else region.shadow.load
    touch(region.index(addresses, size), size, threads, warp.now, what)
