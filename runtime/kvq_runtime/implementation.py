"""Which implementation of attention runs: asked for by the caller, or chosen by the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvq_formats.errors import ConfigError, KVQError

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("reference", "triton")


@dataclass(frozen=True)
class Implementation:
    """What runs, and why.

    Fields:
        name: ``reference`` or ``triton``.
        reason: for people, such as ``torch on cpu``.
    """

    name: str
    reason: str


def choose_implementation(device: torch.device, requested: str | None = None) -> Implementation:
    """The implementation for caches on ``device``; ``requested`` is never swapped for another.

    None chooses by the device. Raises ConfigError for an unknown name, KVQError where the one that
    was asked for cannot run.
    """
    import torch

    if requested not in (None, *IMPLEMENTATIONS):
        raise ConfigError(
            f"impl is {requested!r}, expected {' or '.join(IMPLEMENTATIONS)}.",
            hint="--impl auto (impl=None in Python) chooses by the device",
        )
    if requested == "triton":
        if not torch.cuda.is_available():
            raise KVQError(
                "Triton kernels need a CUDA or ROCm GPU; this machine has none that torch can use.",
                hint="--impl reference (slow, exact)",
            )
        raise KVQError(
            "this version of kvq has no Triton kernels yet.", hint="--impl reference (slow, exact)"
        )
    if device.type == "cuda" and requested is None:
        return Implementation("reference", f"torch on {device}; there are no Triton kernels yet")
    return Implementation("reference", f"torch on {device}")
