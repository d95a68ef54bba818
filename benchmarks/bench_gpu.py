#!/usr/bin/env python3
"""Every check and benchmark that needs a GPU, in one command and within ten minutes.

    make bench-gpu [PYTHON_GPU=python3] [BENCH_GPU_ARGS='--commit abc1234']
    TRITON_INTERPRET=1 make bench-gpu BENCH_GPU_ARGS=--smoke     # tiny, without a GPU

Nothing has to be installed but what kvq needs: sources are found by ``PYTHONPATH``. First kernels
are compared with their references; where one differs nothing is timed and the exit code is 1. Then
what the device and the parts of the fast path could reach is timed, and decode steps, a whole
model's captured step, packing, prefill and a small model against bf16 in the same run
(``gpu_timing`` says how). Rows go to ``benchmarks/results/GPU.csv``, anew after every part, so that
a run that is stopped keeps what it has. ``--only`` runs some parts: with ``--no-tests`` three calls
have all of them without haste. Exit code 2 where it cannot run at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_report import Deadline, Report
    from gpu_shapes import Bench

RESULTS = Path(__file__).resolve().parent / "results"
NEEDED = {
    "torch": "torch>=2.11",
    "triton": "triton>=3.6",
    "transformers": "transformers>=5.17",
    "pydantic": "pydantic>=2.10",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "psutil": "psutil",
    "kvq_formats": "PYTHONPATH, as make bench-gpu sets it",
    "packed_cases": "PYTHONPATH with tests/support, as make bench-gpu sets it",
}
LIMIT_SECONDS = 560.0
GRACE_SECONDS = 15.0
"""After the limit a device that hangs is left: rows are written and the process ends."""

PARTS = {
    "ceilings": 35,
    "decode": 115,
    "captured": 60,
    "kernels": 25,
    "model": 40,
    "pack": 25,
    "prefill": 35,
}
"""Seconds of each part behind the tests and checks."""

TEST_SECONDS = 110.0
CHECK_SECONDS = 115.0
"""These and those of the parts together are the limit, so that none starves another. What is left
over goes to the parts behind."""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also without a GPU")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for everything")
    parser.add_argument("--no-tests", action="store_true", help="the built-in check only")
    parser.add_argument(
        "--despite-failures", action="store_true", help="time, and mark every row invalid"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--commit", help="where there is no git; else the checkout is asked")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run everything; 0 if all that is ours is right."""
    options = arguments(given)
    missing = [f"{name} ({what})" for name, what in NEEDED.items() if find_spec(name) is None]
    if missing:
        print(f"cannot run, not to be imported: {', '.join(missing)}", file=sys.stderr)
        return 2
    # Where kernels are interpreted has to be known before Triton is loaded.
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    device = torch.device("cuda:0" if torch.cuda.is_available() and not interpreted else "cpu")
    if device.type == "cpu" and not (options.smoke and interpreted):
        print(
            "there is no GPU; without one only: TRITON_INTERPRET=1 make bench-gpu "
            "BENCH_GPU_ARGS=--smoke",
            file=sys.stderr,
        )
        return 2
    with torch.no_grad():
        return measure(options, device)


def measure(options: argparse.Namespace, device: object) -> int:
    """All parts on ``device``."""
    import torch
    from gpu_facts import common_columns, file_name
    from gpu_report import Deadline, Report, say
    from gpu_shapes import FULL, SMOKE, Bench

    assert isinstance(device, torch.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.manual_seed_all(0)
    torch.manual_seed(0)
    path = options.output or RESULTS / file_name(device)
    if options.smoke and options.output is None:
        path = Path(tempfile.mkdtemp(prefix="bench-gpu-")) / file_name(device)
    report = Report(path, common_columns(device, given_commit=options.commit))
    bench = Bench(device, report, SMOKE if options.smoke else FULL, options.smoke)
    if options.smoke:
        report.invalid = "smoke: times mean nothing"
        say(f"smoke: tiny shapes, times mean nothing; rows go to {path}")
    total = Deadline(options.limit)
    watch = _watch(report, options.limit + GRACE_SECONDS)
    try:
        _all_parts(bench, options, total)
    finally:
        watch.cancel()
        report.write()
    report.show()
    if report.failures:
        say(f"{report.failures} failures: exit code 1")
    return 1 if report.failures else 0


def _watch(report: Report, seconds: float) -> threading.Timer:
    """End the process, with the rows that there are, where the device does not answer."""

    def leave() -> None:
        report.add("end", "all", "cut", "", note="cut: the device did not come back in time")
        report.write()
        print(f"out of time: {report.path}", file=sys.stderr, flush=True)
        os._exit(1)

    watch = threading.Timer(seconds, leave)
    watch.daemon = True
    watch.start()
    return watch


def _all_parts(bench: Bench, options: argparse.Namespace, total: Deadline) -> None:
    import gpu_captured
    import gpu_ceilings
    import gpu_checks
    import gpu_decode
    import gpu_facts
    import gpu_kernel_times
    import gpu_model
    import gpu_pack
    import gpu_prefill
    from gpu_report import CUT, Deadline, say

    report = bench.report

    def run(name: str, seconds: float, part: Callable[[Bench, Deadline], None]) -> None:
        if total.passed():
            report.add(name, "all", "cut", "", note=CUT)
            return
        say(f"== {name}, {total.left:.0f} s left")
        with report.guarded(name, "all"):
            part(bench, Deadline(seconds, total))
        report.write()

    run("facts", 10, gpu_facts.run_facts)
    if not options.no_tests:
        run("checks", TEST_SECONDS, gpu_checks.run_tests)
    run("checks", CHECK_SECONDS, gpu_checks.run_built_in)
    if report.failures:
        report.add("checks", "all", "failures", report.failures, "", "nothing was timed")
        if not options.despite_failures:
            return
        report.rows[-1]["note"] = "timed all the same, as asked"
        report.invalid = "INVALID: checks failed"
    parts = {
        "ceilings": gpu_ceilings.run,
        "decode": gpu_decode.run,
        "captured": gpu_captured.run,
        "kernels": gpu_kernel_times.run,
        "model": gpu_model.run,
        "pack": gpu_pack.run,
        "prefill": gpu_prefill.run,
    }
    chosen = list(options.only or PARTS)
    for place, name in enumerate(chosen):
        shares = sum(PARTS[other] for other in chosen[place:])
        run(name, PARTS[name] * max(1.0, total.left / shares), parts[name])


if __name__ == "__main__":
    raise SystemExit(main())
