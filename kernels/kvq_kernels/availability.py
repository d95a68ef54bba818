"""Whether Triton kernels can run here; importing this imports neither Triton nor torch."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton runs its kernels in Python, on any device (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)
