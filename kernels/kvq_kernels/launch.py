"""How kernels are launched: in one place, by device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton

from kvq_kernels.launch_table import DecodeLaunch

LARGEST_GROUP = 16
LARGEST_HEAD_DIM = 256


def group_tile(G: int, *, device: torch.device) -> int:
    """Width of the query heads' side of a tile: a matrix instruction's, at least G."""
    assert G <= LARGEST_GROUP, "check_layer refuses this"
    smallest = 16 if is_amd() and device.type == "cuda" else 8
    return max(smallest, int(triton.next_power_of_2(G)))


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be that of the numbers."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def exact_precision(dtype: torch.dtype) -> str:
    """How exact tokens are multiplied, for queries of ``dtype``; f32 queries keep nearly all bits.

    NVIDIA has no matrix instruction for f32; three in tf32 are off by about ``2**-21``. AMD has
    one, and tf32 on few architectures.
    """
    if is_amd():
        return "ieee"
    return "tf32" if dtype in (torch.float16, torch.bfloat16) else "tf32x3"


def is_amd() -> bool:
    """Whether torch was built for ROCm."""
    return torch.version.hip is not None


def warp_lanes(device: torch.device) -> int:
    """Threads of a warp."""
    return 64 if is_amd() and device.type == "cuda" else 32


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; 1 for a CPU, which interprets."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def architecture(device: torch.device) -> str:
    """Name of what code is compiled for: ``sm_90``, ``gfx942``; ``cpu`` where it is interpreted."""
    if device.type != "cuda":
        return device.type
    if is_amd():
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def page_splits(
    launch: DecodeLaunch, *, batch: int, num_kv_heads: int, max_pages: int, device: torch.device
) -> int:
    """Programs that the pages of a row and head are shared out to."""
    room = launch.programs * multiprocessors(device) // (batch * num_kv_heads)
    return max(1, min(room, max_pages))
