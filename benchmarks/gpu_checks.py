"""Correctness on the device: the repository's tests where pytest is, and a check that needs none.

The check compares every kernel with its reference in torch at the very shapes that are measured
afterwards, so that what it compiles is not compiled again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import Thread

import torch
from gpu_check_kernels import CHECKS
from gpu_report import CUT, Deadline, say
from gpu_shapes import Bench, Codes, Shape
from gpu_timing import brief
from results_csv import REPOSITORY

PART = "checks"
TESTS = (
    "tests/kernels",
    "tests/runtime/test_kernels_on_a_model.py",
    "tests/runtime/test_cuda_graph.py",
    "tests/runtime/test_captured_decode.py",
)
SMOKE_TESTS = ("tests/kernels/test_rotary.py",)
SOURCES = ("formats", "kernels", "runtime", "calibration", "evaluation", ".")
SUPPORT = ("tests/support", "benchmarks")
WORKERS = 8
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
PLACE = re.compile(r"(tests/\S+?\.py)::\S+")
SUMMARY = re.compile(r"(?:FAILED|ERROR) (tests/\S+)(?: - (.*))?$")
"""A line of pytest's summary, which repeats what failed, with a reason."""

MOST_NAMED = 10
MEASURED_EVERYWHERE = ("decode", "pack")


def run_tests(bench: Bench, deadline: Deadline) -> None:
    """The repository's tests of kernels, in a process of their own."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        note = f"{' and '.join(missing)} not installed: the built-in check stands alone"
        bench.report.add(PART, "pytest", "passed", "", "tests", note)
        return
    tests = SMOKE_TESTS if bench.smoke else TESTS
    there = [test for test in tests if (REPOSITORY / test).exists()]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-v"]
    command += ["-p", "no:cacheprovider", "--tb=line", "--color=no", *there]
    if find_spec("xdist") is not None:
        # Compiling is most of it, and that is work of one core a process.
        workers = max(1, min(WORKERS, (os.cpu_count() or 2) // 2))
        command += ["-n", str(workers), "--dist", "worksteal"]
    say(f"pytest {' '.join(there)}")
    lines, ended = _output_of(command, bench.device, deadline)
    tally(bench, lines, ended=ended)


def _output_of(
    command: list[str], device: torch.device, deadline: Deadline
) -> tuple[list[str], int | None]:
    """Lines that a command printed until the deadline, and its exit code; None if it was cut."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in (*SOURCES, *SUPPORT))
    environment = os.environ | {
        "KVQ_TEST_DEVICE": device.type,
        "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        # pytest cuts reasons of failures to the width of a terminal.
        "COLUMNS": "300",
    }
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    printed: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            printed.put(line.rstrip())
        printed.put(None)

    Thread(target=read, daemon=True).start()
    lines: list[str] = []
    while not deadline.passed():
        try:
            line = printed.get(timeout=max(0.01, min(1.0, deadline.left)))
        except Empty:
            continue
        if line is None:
            return lines, process.wait()
        lines.append(line)
    # Its workers, too: they would go on using the device while others are timed.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return lines, None


def tally(bench: Bench, lines: list[str], *, ended: int | None) -> None:
    """Rows of what pytest printed: outcomes of each file, and the first failures by name."""
    report = bench.report
    outcomes: dict[str, Counter[str]] = {}
    bad: dict[str, str] = {}
    for line in lines:
        if summed := SUMMARY.match(line):
            bad[summed[1]] = summed[2] or ""
            continue
        outcome, place = OUTCOME.search(line), PLACE.search(line)
        if outcome is None or place is None:
            continue
        outcomes.setdefault(place[1], Counter())[outcome[1]] += 1
        if outcome[1] in ("FAILED", "ERROR"):
            bad.setdefault(place[0], "")
    cut = (
        f"cut after {sum(counts.total() for counts in outcomes.values())} outcomes"
        if ended is None
        else ""
    )
    for file, counts in outcomes.items():
        failed = counts["FAILED"] + counts["ERROR"]
        note = "; ".join(text for text in (f"{failed} failed" if failed else "", cut) if text)
        report.add(PART, f"pytest {file}", "passed", counts["PASSED"], "tests", note)
    for name, reason in list(bad.items())[:MOST_NAMED]:
        report.add(PART, "pytest", "failed", 1, "tests", f"{name}: {reason}")
    if ended is None:
        report.add(PART, "pytest", "cut", sum(c.total() for c in outcomes.values()), "tests", CUT)
    # 5 is "no tests found", which no selection here should be.
    elif ended != 0 and not bad:
        for line in lines[-20:]:
            say(line)
        note = next((line for line in reversed(lines) if line.strip()), "")
        report.add(PART, "pytest", "exit code", ended, "", note)
    report.failures += len(bad) or int(ended not in (0, None))


def run_built_in(bench: Bench, deadline: Deadline) -> None:
    """Every kernel against its reference; rows are the error over what is allowed.

    Decoding and packing at every shape that is measured, the others where prompts are. What there
    is no time for is said and is no failure: decode steps and prefill are compared once more at
    their full size, each before it is timed.
    """
    shapes = list(dict.fromkeys(case.shape for case in bench.sizes.cases))
    prompts = [bench.sizes.prompt_shape]
    report = bench.report
    begun = time.monotonic()
    for name, check in CHECKS.items():
        for shape in shapes if name in MEASURED_EVERYWHERE else prompts:
            for codes in bench.sizes.codes:
                cells = {"shape": shape.name, **codes.columns}
                if deadline.passed():
                    report.add(PART, name, "error over bound", "", "", CUT, **cells)
                else:
                    _check(bench, name, check, shape, codes, cells)
    report.add(PART, "built-in check", "seconds", time.monotonic() - begun, "s", "with compiling")


def _check(
    bench: Bench, name: str, check: object, shape: Shape, codes: Codes, cells: dict[str, object]
) -> None:
    report = bench.report
    assert callable(check)
    try:
        excess = float(check(shape, codes, bench.device))
    except ModuleNotFoundError as error:
        report.add(PART, name, "error over bound", "", "", f"not there: {error.name}", **cells)
        return
    # A kernel that does not compile or run fails its check; the others still say what they find.
    except Exception as error:
        report.add(PART, name, "error over bound", "", "", f"failed: {brief(error)}", **cells)
        report.failures += 1
        return
    passed = excess <= 1  # NaN does not
    report.failures += not passed
    note = "passed" if passed else "failed"
    report.add(PART, name, "error over bound", excess, "", note, **cells)
