"""How much memory is free where a model will run."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much a container may use; inside one, its own group is the root."""


def available_bytes(place: str) -> int:
    """Free bytes of a device, or of all GPUs and the host where weights are spread (``auto``)."""
    if place == "cpu":
        return host_available_bytes()
    if place.startswith("cuda"):
        return _gpu_available_bytes(torch.device(place).index)
    if torch.cuda.is_available():
        gpus = sum(_gpu_available_bytes(index) for index in range(torch.cuda.device_count()))
        return gpus + host_available_bytes()
    # Others, such as mps, share the host's memory.
    return host_available_bytes()


def host_available_bytes() -> int:
    """What the system can give without swapping, within the limit of a container."""
    free = int(psutil.virtual_memory().available)
    limited = _group_available_bytes(CONTROL_GROUP)
    return free if limited is None else max(0, min(free, limited))


def _group_available_bytes(group: Path) -> int | None:
    """What a control group (version 2) may still take; None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text().split()
    except OSError:
        # No Linux, version 1, or a root group, which has no limit.
        return None
    # Pages of files are counted as used, and given up on demand.
    counts = dict(zip(statistics[::2], statistics[1::2], strict=True))
    return int(limit) - used + int(counts.get("inactive_file", 0))


def _gpu_available_bytes(index: int | None) -> int:
    free, _ = torch.cuda.mem_get_info(index)
    # What torch holds in reserve is ours to use.
    held = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return free + held
