"""Races: accesses to one byte that no barrier puts in order.

The threads of a warp run in lockstep here and CTAs one after another, so that a barrier that is
missing between threads of one warp, or a value that another CTA has to have stored, makes no
difference to what is computed. It is looked for instead: who touched each byte last is kept.

Reported are a load of what another thread stored, and a store to what another thread loaded or, in
global memory, stored, where

* the other one is of another CTA: nothing orders CTAs within a launch;
* it is of another warp, and no ``bar.sync`` of both came in between;
* it is of the same warp, and neither a ``bar.sync`` nor a ``bar.warp.sync`` came in between.
  ``shfl.sync`` and the like do not order memory (PTX ISA 8.7, 9.7.13).

Not reported are

* two stores to one place in shared memory, and those of one instruction to one place anywhere:
  Triton has threads store replicas. The orders of a run tell whether it matters which one wins;
* what atomic operations touch. They order nothing either: a kernel in which a CTA waits for another
  one by a counter has to be run without this check;
* prefetches, and what is only read;
* what ``wgmma`` reads. The warps of a group read what all of them stored, so that a barrier missing
  in front of it is seen in its results;
* accesses with a barrier of some other warps, or a ``bar.warp.sync`` of some other threads, between
  them: counts of barriers are compared, not who came;
* accesses through two tensors that overlap.

Loads and stores that are volatile, relaxed, acquire or release count as plain ones. ``cp.async``
counts as a store when it is issued, and again when it is waited for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
SEVERAL = -1
"""In place of a thread, warp or CTA: more than one."""
COARSEST = 16

TOUCH = np.dtype(
    [(name, np.int32) for name in ("cta", "warp", "thread", "barriers", "warp_barriers")]
)
"""Who touched a place last, and when; CTAs count from 1, as 0 is nobody."""


class RaceError(RuntimeError):
    """Two threads touch one byte, one of them stores, and no barrier puts them in order."""


class Moment(NamedTuple):
    """Where a warp is.

    Fields:
        cta: its number, from 1 on.
        warp: its number in the CTA.
        barriers: ``bar.sync`` that it has passed, or that those it met there have.
        warp_barriers: ``bar.warp.sync`` that it has passed.
    """

    cta: int
    warp: int
    barriers: int
    warp_barriers: int


class Shadow:
    """Who touched each byte of a region last.

    Args:
        name: of the region, for messages.
        length: bytes, a multiple of 16.
        replicas: whether several threads may store to one place.

    Fields:
        grain: bytes of each entry: of the smallest access so far.
        writers: last store to each, ``TOUCH``.
        readers: loads of each since then that are the latest by barriers, ``TOUCH``.
    """

    def __init__(self, name: str, length: int, *, replicas: bool) -> None:
        self.name, self.replicas, self.grain = name, replicas, COARSEST
        self.writers: Array = np.zeros(length // COARSEST, TOUCH)
        self.readers: Array = np.zeros(length // COARSEST, TOUCH)

    def load(self, index: Array, size: int, threads: Array, now: Moment, what: object) -> None:
        """Threads load elements ``index`` of ``size`` bytes.

        Raises:
            RaceError: One has been stored by another thread, with no barrier since.
        """
        places, threads = self._places(index, size, threads)
        self._check(self.writers, places, threads, now, f"stored: {what}")
        before = self.readers[places]
        after = _touch(threads, now)
        if before["cta"].any():
            here = before["cta"] == now.cta
            ctas = (before["cta"] != 0) & ~here
            at_once = here & (before["barriers"] == now.barriers)
            warps = ctas | (at_once & (before["warp"] != now.warp))
            others = before["thread"] != threads
            others &= before["warp_barriers"] == now.warp_barriers
            after["cta"][ctas] = SEVERAL
            after["warp"][warps] = SEVERAL
            after["thread"][warps | (at_once & others)] = SEVERAL
            later = here & (before["barriers"] > now.barriers)
            after[later] = before[later]
        self.readers[places] = after
        # Several threads of this instruction
        lost = self.readers["thread"][places] != after["thread"]
        self.readers["thread"][places[lost]] = SEVERAL

    def store(self, index: Array, size: int, threads: Array, now: Moment, what: object) -> None:
        """Threads store elements ``index`` of ``size`` bytes.

        Raises:
            RaceError: One has been touched by another thread, with no barrier since.
        """
        places, threads = self._places(index, size, threads)
        if not self.replicas:
            self._check(self.writers, places, threads, now, f"stored: {what}")
        self._check(self.readers, places, threads, now, f"loaded: {what}")
        self.writers[places] = _touch(threads, now)
        self.readers["cta"][places] = 0

    def _places(self, index: Array, size: int, threads: Array) -> tuple[Array, Array]:
        """Entries of elements, and the thread of each."""
        if size < self.grain:
            self.writers = np.repeat(self.writers, self.grain // size)
            self.readers = np.repeat(self.readers, self.grain // size)
            self.grain = size
        count = size // self.grain
        if count == 1:
            return index, threads
        return (index[:, None] * count + np.arange(count)).ravel(), np.repeat(threads, count)

    def _check(self, touched: Array, places: Array, threads: Array, now: Moment, what: str) -> None:
        before = touched[places]
        cta = before["cta"]
        if not cta.any():
            return
        here = cta == now.cta
        wrong = (before["thread"] != threads) | (threads == SEVERAL)
        wrong &= before["warp_barriers"] == now.warp_barriers
        wrong |= before["warp"] != now.warp
        wrong &= before["barriers"] >= now.barriers
        wrong &= here
        wrong |= (cta != 0) & ~here
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            one = before[first]
            raise RaceError(
                f"{_name(threads[first], now.warp, now.cta)} touches byte "
                f"{places[first] * self.grain} of {self.name}, which with no barrier in between "
                f"{_name(one['thread'], one['warp'], one['cta'])} {what}"
            )


def _touch(threads: Array, now: Moment) -> Array:
    touch = np.empty(len(threads), TOUCH)
    touch["thread"] = threads
    for name, value in now._asdict().items():
        touch[name] = value
    return touch


def _name(thread: int, warp: int, cta: int) -> str:
    if cta == SEVERAL:
        return "threads of several CTAs"
    if warp == SEVERAL:
        return f"threads of several warps of CTA {cta - 1}"
    if thread == SEVERAL:
        return f"threads of warp {warp} of CTA {cta - 1}"
    return f"thread {thread} of CTA {cta - 1}"
