"""Which implementation of attention runs: asked for by the caller, or chosen by the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from kvq_formats.errors import ConfigError, KVQError
from kvq_kernels.availability import interprets, is_installed

if TYPE_CHECKING:
    import torch

ImplementationName = Literal["reference", "triton"]
IMPLEMENTATIONS = get_args(ImplementationName)


@dataclass(frozen=True)
class Implementation:
    """What runs, and why.

    Fields:
        name: ``reference`` (plain torch) or ``triton``.
        reason: for people, such as ``torch on cpu``.
    """

    name: ImplementationName
    reason: str


def choose_implementation(device: torch.device, requested: str | None = None) -> Implementation:
    """The implementation for caches on ``device``; ``requested`` is never swapped for another.

    None chooses by the device: kernels on CUDA and ROCm, the reference everywhere else. Raises
    ConfigError for an unknown name, KVQError where the one that was asked for cannot run.
    """
    if requested not in (None, *IMPLEMENTATIONS):
        raise ConfigError(
            f"impl is {requested!r}, expected {' or '.join(IMPLEMENTATIONS)}.",
            hint="--impl auto (impl=None in Python) chooses by the device",
        )
    if requested == "reference" or (requested is None and device.type != "cuda"):
        return Implementation("reference", f"torch on {device}")
    if not is_installed():
        raise KVQError(
            "Triton kernels were chosen, and Triton is not installed.",
            hint="pip install 'triton>=3.6', or --impl reference (slow, exact)",
        )
    if device.type == "cuda":
        return Implementation("triton", f"kernels on {device}")
    if interprets():
        return Implementation("triton", f"kernels interpreted on {device}")
    raise KVQError(
        f"Triton kernels need a CUDA or ROCm GPU; the model is on {device}.",
        hint="--impl reference (slow, exact), or --device-map cuda where there is a GPU",
    )
