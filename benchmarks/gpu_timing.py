"""Times of short GPU work, with a cold cache: laps over several copies of what is read.

A contestant is a *lap*: one call for each of several copies of its data, together larger than the
second-level cache by so much that a copy is gone from it when its turn comes again. A lap is
captured as one CUDA graph, so that launching costs what it costs in a captured model; a sample is
one replay divided by the calls in it. Contestants take turns in rounds, so that a clock that drifts
hits all of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

Lap = Sequence[Callable[[], object]]

CACHE_MULTIPLE = 4
"""Bytes of a lap over those of the cache: least recent first, or at random (``exp(-4)``), at most
2 % of a copy is still there."""

MOST_COPIES = 128
ROUNDS = 10
REPLAYS = 6
"""Samples of a contestant in a round."""

WARM_SECONDS = 0.1
"""Replays before the first round: clocks rise with the load."""

LONG_LAP_SECONDS = 0.02
"""Beyond it a round has one sample, and there are as many as take ``LONG_SECONDS``."""

LONG_SECONDS = 1.0


@dataclass
class Timing:
    """Seconds of one call.

    Fields:
        samples: of each replay.
        how: ``graph``, ``eager`` where the call cannot be captured, or ``interpreted``.
        first: seconds of the first call, which compiles.
        error: why there are no samples.
    """

    how: str = "graph"
    samples: list[float] = field(default_factory=list)
    first: float = 0.0
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """Seconds that ``share`` of the samples stay below."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def copies_of(nbytes: int, *, device: torch.device) -> int:
    """Copies of data of ``nbytes`` that make a lap cold."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, -(-CACHE_MULTIPLE * cache // max(1, nbytes))))


def race(
    laps: Mapping[str, Lap],
    *,
    device: torch.device,
    rounds: int = ROUNDS,
    replays: int = REPLAYS,
    expired: Callable[[], bool] = lambda: False,
    captured: bool = True,
) -> dict[str, Timing]:
    """Time every lap in turns; what cannot run has an error, and the others go on.

    ``expired`` is asked between rounds: no round begins once it is True and two are done. Without
    ``captured`` laps are launched anew each time, which only long ones bear.
    """
    if device.type != "cuda":
        return {name: _interpreted(lap) for name, lap in laps.items()}
    timings: dict[str, Timing] = {}
    replay: dict[str, Callable[[], object]] = {}
    for name, lap in laps.items():
        timings[name] = Timing()
        try:
            replay[name] = _prepared(lap, timings[name], captured=captured)
        # A baseline that is not made for this shape or card must not end the others.
        except Exception as error:
            timings[name].error = brief(error)
    samples: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name, again in replay.items():
        seconds = _warm(again)
        long = seconds > LONG_LAP_SECONDS
        samples[name] = 1 if long else replays
        counts[name] = max(3, min(rounds, int(LONG_SECONDS / seconds))) if long else rounds
    names = list(replay)
    for number in range(rounds):
        if number >= 2 and expired():
            break
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if number >= counts[name]:
                continue
            lap_seconds = _replayed(replay[name], samples[name])
            timings[name].samples += [seconds / len(laps[name]) for seconds in lap_seconds]
    return timings


def brief(error: BaseException) -> str:
    """One line that names an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _interpreted(lap: Lap) -> Timing:
    timing = Timing(how="interpreted")
    try:
        for place in range(2):
            begun = time.perf_counter()
            for call in lap:
                call()
            seconds = time.perf_counter() - begun
            timing.first = seconds if place == 0 else timing.first
            timing.samples.append(seconds / len(lap))
    except Exception as error:
        timing.error = brief(error)
        timing.samples.clear()
    return timing


def _prepared(lap: Lap, timing: Timing, *, captured: bool) -> Callable[[], object]:
    """Compile, and capture the lap; returns what replays it."""

    def eagerly() -> None:
        for call in lap:
            call()

    begun = time.perf_counter()
    lap[0]()
    torch.cuda.synchronize()
    timing.first = time.perf_counter() - begun
    if not captured:
        timing.how = "eager"
        return eagerly
    # Capturing wants everything loaded and planned, and that on a stream beside the default one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eagerly()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eagerly()
        graph.replay()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        print(f"not captured, runs eagerly: {brief(error)}", file=sys.stderr)
        torch.cuda.synchronize()
        timing.how = "eager"
        return eagerly
    return graph.replay


def _warm(again: Callable[[], object]) -> float:
    """Replay until clocks have risen; seconds of one replay at the end."""
    begun = time.perf_counter()
    while True:
        (seconds,) = _replayed(again, 1)
        if time.perf_counter() - begun > WARM_SECONDS:
            return seconds


def _replayed(again: Callable[[], object], count: int) -> list[float]:
    """Seconds of ``count`` replays by events on the device, after one that is not counted."""
    again()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        again()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
