#!/usr/bin/env python3
"""What a user waits for: wall time and peak memory of whole commands, each in a fresh process.

    python benchmarks/commands.py [--skip demo] [-o CSV]

``help`` is run ten times and the median counts; the others once. Peak memory is the resident set of
the command's own process. Until it starts that process is a copy of this one, so that nothing large
may be imported here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from results_csv import commit, write_csv

KVQ = Path(sys.executable).parent / "kvq"


@dataclass(frozen=True)
class Measurement:
    """Seconds and MiB of one command."""

    name: str
    seconds: float
    peak_mib: float
    bar: str


def run(name: str, arguments: list[str], bar: str, *, repeats: int = 1) -> Measurement:
    """Run a kvq command ``repeats`` times; raises CalledProcessError if it fails."""
    times, peaks = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        process = subprocess.Popen(
            [KVQ, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        messages = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        times.append(time.perf_counter() - started)
        peaks.append(usage.ru_maxrss / 1024)
        if status:
            raise subprocess.CalledProcessError(status, arguments, stderr=messages)
    return Measurement(name, statistics.median(times), max(peaks), bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="*", default=[], choices=["help", "calibrate", "demo"])
    default = Path(__file__).parent / "results" / "commands.csv"
    parser.add_argument("-o", "--output", type=Path, default=default)
    args = parser.parse_args()

    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KVQ_CACHE"] = str(Path(folder) / "cache")
        if "help" not in args.skip:
            measurements.append(run("help", ["--help"], "0.3 s", repeats=10))
        if "calibrate" not in args.skip:
            options = ["--bits", "3", "--num-samples", "16", "--seq-len", "1024"]
            output = ["-o", str(Path(folder) / "sidecar")]
            measurements.append(run("calibrate", ["calibrate", *options, *output], "60 s"))
        if "demo" not in args.skip:
            measurements.append(run("demo", ["demo"], "240 s, 3072 MiB"))

    for m in measurements:
        print(f"{m.name:10} {m.seconds:8.2f} s {m.peak_mib:8.0f} MiB   bar: {m.bar}")
    write_csv(
        args.output,
        [
            {
                "command": f"kvq {m.name}",
                "seconds": m.seconds,
                "peak_mib": round(m.peak_mib),
                "bar": m.bar,
                "cores": os.cpu_count(),
                "kvq": version("kvq"),
                "torch": version("torch"),
                "transformers": version("transformers"),
                "commit": commit(),
            }
            for m in measurements
        ],
    )


if __name__ == "__main__":
    main()
