"""The most memory that this process has held so far."""

from __future__ import annotations

import sys
from pathlib import Path

from kvq_cli.sizes import KIB, show_bytes


def host_peak_bytes() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not say."""
    try:
        # Linux's getrusage counts what ran in this process before, such as a large parent.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * KIB
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return int(peak if sys.platform == "darwin" else peak * KIB)


def gpu_peak_bytes() -> int | None:
    """Peak memory that torch allocated on all GPUs; None without torch in use or without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def peak_memory() -> str:
    """Peak of the host and, where one is in use, of the GPU, for people."""
    parts = []
    host, gpu = host_peak_bytes(), gpu_peak_bytes()
    if host is not None:
        parts.append(show_bytes(host))
    if gpu is not None:
        parts.append(f"{show_bytes(gpu)} GPU")
    return " + ".join(parts) or "unknown"


def peak_memory_json() -> dict[str, int | None]:
    """Both peaks in bytes; null where unknown or not in use."""
    return {"host_bytes": host_peak_bytes(), "gpu_bytes": gpu_peak_bytes()}
