"""Each kernel of a decode step by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_cases import PackedLayerTables, packed_rows, random_numbers
from gpu_paths import cold_copies, kvq_lap
from gpu_report import CUT, Deadline, say
from gpu_shapes import Bench
from gpu_timing import Lap, Timing, brief
from triton.runtime.jit import KernelInterface

from kvq_kernels import decode as decode_module

PART = "decode kernels"
KERNELS = (
    "decode_pages",
    *(name for name, found in vars(decode_module).items() if isinstance(found, KernelInterface)),
)
"""What a decode step launches, compiled or interpreted."""


def run(bench: Bench, deadline: Deadline) -> None:
    """Each kernel of one step by itself, for every width."""
    case, device, report = bench.sizes.parts_case, bench.device, bench.report
    shape = case.shape
    for codes in bench.sizes.codes:
        cells = case.columns | codes.columns
        if deadline.passed():
            report.add(PART, "all", "us", "", "us", CUT, **cells)
            continue
        with report.guarded(PART, "all", **cells):
            size = (case.batch, shape.num_kv_heads, case.tokens, shape.head_dim)
            keys, values = (random_numbers(*size, device=device) for _ in range(2))
            query = random_numbers(case.batch, shape.num_heads, shape.head_dim, device=device)
            layer = PackedLayerTables.of(shape, codes, device=device)
            lap = kvq_lap(layer, query, cold_copies(packed_rows(layer, keys, values)))
            for name, timing in kernel_times(lap, device=device).items():
                report.add_timing(PART, name, timing, **cells)


def kernel_times(lap: Lap, *, device: torch.device, laps: int = 15) -> dict[str, Timing]:
    """Seconds of each kernel of a decode step, by the profiler, or else by events around it."""
    for call in lap:
        call()
    if device.type != "cuda":
        return _by_events(lap, device=device, laps=1)
    try:
        found = _by_profiler(lap, laps=laps)
    # Without the driver's permission the profiler fails in ways of its own.
    except Exception as error:
        say(f"the profiler gives nothing: {brief(error)}")
        found = {}
    return found or _by_events(lap, device=device, laps=laps)


def _by_profiler(lap: Lap, *, laps: int) -> dict[str, Timing]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(laps):
            for call in lap:
                call()
        torch.cuda.synchronize()
    found: dict[str, Timing] = {}
    for event in profiler.events():
        if event.name in KERNELS and (seconds := 1e-6 * event.time_range.elapsed_us()) > 0:
            found.setdefault(event.name, Timing(how="profiler")).samples.append(seconds)
    return found


def _by_events(lap: Lap, *, device: torch.device, laps: int) -> dict[str, Timing]:
    """Where the host is slower than a kernel, launching it counts, too."""
    on_gpu = device.type == "cuda"
    marks: dict[str, list[tuple[Any, Any]]] = {}

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    class Marked:
        """A kernel whose launches are marked."""

        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*arguments: Any, **named: Any) -> None:
                begun = mark()
                self.kernel[grid](*arguments, **named)
                marks.setdefault(self.name, []).append((begun, mark()))

            return launch

    with _replaced(Marked):
        for _ in range(laps):
            for call in lap:
                call()
    if on_gpu:
        torch.cuda.synchronize()
    how = "events" if on_gpu else "interpreted"
    return {
        name: Timing(how, [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairs])
        for name, pairs in marks.items()
    }


@contextmanager
def _replaced(wrap: Callable[[str, Any], Any]) -> Iterator[None]:
    module = vars(decode_module)
    stock = {name: module[name] for name in KERNELS if name in module}
    fast_kernels = decode_module.fast_kernels
    # Side passes of the fast path have the names of the others.
    decode_module.fast_kernels = lambda: tuple(
        wrap(kernel.__name__, kernel) for kernel in fast_kernels()
    )
    try:
        for name, kernel in stock.items():
            setattr(decode_module, name, wrap(name, kernel))
        yield
    finally:
        decode_module.fast_kernels = fast_kernels
        for name, kernel in stock.items():
            setattr(decode_module, name, kernel)
