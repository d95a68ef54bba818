"""Resident memory of this process and its peak, and measurements in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from kvq_cli.peak_memory import host_peak_bytes


def peak_bytes() -> int:
    """The most resident memory since the start, or since ``reset_peak``."""
    peak = host_peak_bytes()
    assert peak is not None, "this system does not say how much memory a process has held"
    return peak


def reset_peak() -> bool:
    """Begin the peak anew at what is resident now; False where the system cannot (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def settled_bytes() -> int:
    """Resident memory once everything that is no longer in use has gone back to the system."""
    gc.collect()
    if sys.platform.startswith("linux"):
        # The allocator keeps freed blocks otherwise, and a later peak would hide in them.
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def in_own_process(script: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a script with ``arguments``; what it prints as JSON on its last line of stdout.

    Raises CalledProcessError, after its stderr has been shown, if it fails.
    """
    done = subprocess.run(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed
