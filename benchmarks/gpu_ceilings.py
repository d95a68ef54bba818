"""What a decode step could reach: memory, and the parts of its fast path, each by itself.

First the memory: a large copy and a large sum. Then, over the pages of one step, the kernels of
``ceiling_kernels``, ``decode_pages`` itself ("all"), and a plain copy of the same words by torch.
They are launched with what the decode step launches ``decode_pages`` with, compared with plain
torch, and timed as the decode part does: graphs, a cold cache, in turns. Queries of the pages, 4 %
more to read at most, are the same memory for all copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ceiling_kernels import score_pages, unpack_pages, weigh_pages
from ceiling_reference import Expected, expected
from gpu_cases import PackedLayerTables, packed_rows, random_numbers
from gpu_paths import Launched, cold_copies, kvq_lap, launch_of
from gpu_report import CUT, Deadline, say
from gpu_shapes import Bench, Codes
from gpu_timing import Lap, Timing, race
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.nvidia.decode_pages import decode_pages

PART = "ceilings"
SUMS_OFF = 2.0**-20
"""Of itself, what a sum of values may be off by."""

PARTS: dict[str, Any] = {"unpack": unpack_pages, "keys": score_pages, "values": weigh_pages}


def run(bench: Bench, deadline: Deadline) -> None:
    """Memory, then the parts of the fast path for every width, the most important first."""
    _memory(bench, deadline)
    report, case = bench.report, bench.sizes.parts_case
    if bench.device.type != "cuda":
        note = "not measured: Gluon is compiled, not interpreted"
        where: dict[str, Any] = dict(case.columns)
        report.add(PART, "decode_pages", "us", "", "us", note, **where)
        return
    for codes in bench.sizes.codes:
        cells: dict[str, Any] = case.columns | codes.columns
        if deadline.passed():
            report.add(PART, "decode_pages", "us", "", "us", CUT, **cells)
            continue
        say(f"ceilings: {codes.name}")
        with report.guarded(PART, "decode_pages", **cells):
            _parts(bench, codes, deadline, cells)
        report.write()


def _memory(bench: Bench, deadline: Deadline) -> None:
    """Bandwidth of a large copy, reads and writes counted, and of a large sum, reads only."""
    report, count = bench.report, bench.sizes.copied_bytes // 4
    with report.guarded(PART, "memory"):
        source = torch.randn(count, device=bench.device)
        target = torch.empty_like(source)
        laps: dict[str, Lap] = {"copy": [lambda: target.copy_(source)], "sum": [source.sum]}
        timings = race(laps, device=bench.device, expired=deadline.passed)
        for name, moved in (("copy", 2 * source.nbytes), ("sum", source.nbytes)):
            timing = timings[name]
            report.add_timing(PART, name, timing, note=f"{source.nbytes} B")
            if timing.samples:
                report.add(PART, name, "bandwidth", moved / timing.median / 1e9, "GB/s")


def _parts(bench: Bench, codes: Codes, deadline: Deadline, cells: dict[str, Any]) -> None:
    case, device, report = bench.sizes.parts_case, bench.device, bench.report
    shape = case.shape
    layer = PackedLayerTables.of(shape, codes, device=device)
    size = (case.batch, shape.num_kv_heads, case.tokens, shape.head_dim)
    query = random_numbers(case.batch, shape.num_heads, shape.head_dim, device=device)
    keys, values = (random_numbers(*size, device=device) for _ in range(2))
    steps = kvq_lap(layer, query, cold_copies(packed_rows(layer, keys, values)))
    del keys, values
    launches = [one for one in map(launch_of, steps) if one is not None]
    if not launches:
        note = "not measured: this device or shape takes the portable path"
        report.add(PART, "decode_pages", "us", "", "us", note, **cells)
        return
    known = expected(launches[0], layer.tables)
    laps: dict[str, Lap] = {}
    for name in PARTS:
        call, folded = part_call(name, launches[0])
        call()
        excess = error_over_bound(name, folded, known)
        report.failures += not excess <= 1
        note = "passed" if excess <= 1 else "failed, not timed"
        report.add(PART, name, "error over bound", excess, "", note, **cells)
        if excess <= 1:
            laps[name] = [call, *(part_call(name, other)[0] for other in launches[1:])]
    laps["all"] = [launched.again(decode_pages) for launched in launches]
    laps["copy of the words"] = [_copying(launched) for launched in launches]
    _add_rows(bench, launches[0], race(laps, device=device, expired=deadline.passed), cells)


def _add_rows(
    bench: Bench, launched: Launched, timings: dict[str, Timing], cells: dict[str, Any]
) -> None:
    """Times, packed words a second (a copy moves them twice), and numbers that they hold."""
    report = bench.report
    words = {name: launched.arguments[f"{name}_words"].nbytes for name in ("key", "value")}
    held = launched.arguments["key_words"].shape[0] * PAGE_TOKENS
    held *= launched.arguments["H"] * launched.arguments["D"]
    both = sum(words.values())
    moved = {"keys": words["key"], "values": words["value"], "copy of the words": 2 * both}
    for name, timing in timings.items():
        report.add_timing(PART, name, timing, note="words of codes only", **cells)
        if not timing.samples:
            continue
        rate = moved.get(name, both) / timing.median / 1e9
        report.add(PART, name, "bandwidth", rate, "GB/s", **cells)
        numbers = held if name in ("keys", "values") else 2 * held
        report.add(PART, name, "elements", numbers / timing.median / 1e9, "1e9/s", **cells)


def part_call(name: str, launched: Launched) -> tuple[Callable[[], object], Tensor]:
    """A launch of a part over the pages of ``launched``, and what it will leave there."""
    splits, H, B = launched.grid
    arguments = launched.arguments
    more = {"unpack": (), "keys": (arguments["G"],), "values": (arguments["D"],)}[name]
    folded = torch.empty(
        (B, H, splits, *more),
        dtype=torch.int32 if name == "unpack" else torch.float32,
        device=arguments["key_words"].device,
    )
    return launched.again(PARTS[name], folded=folded), folded


def error_over_bound(name: str, folded: Tensor, known: Expected) -> float:
    """At most 1 where a part has done its work; NaN is passed on."""
    if name == "unpack":
        return 0.0 if torch.equal(folded, known.unpack) else float("inf")
    if name == "values":
        # Integers: f32 holds those below 2**24, only sums of many pages are beyond.
        off = (folded.double() - known.values).abs() / known.values.clamp(min=1)
        return float(off.max()) / SUMS_OFF
    allowed = known.key_sums + known.key_roundings
    return float(((folded.double() - known.keys).abs() / allowed.clamp(min=1e-30)).max())


def _copying(launched: Launched) -> Callable[[], object]:
    words = [launched.arguments[f"{name}_words"].flatten() for name in ("key", "value")]
    source = torch.cat(words)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
