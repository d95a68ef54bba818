"""Modes of torch that a cache does not want to depend on: inference, gradients, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Tensors made inside can be written to later, in inference mode or out of it, no graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """What is computed inside is no part of a graph, and no autocast changes its dtypes."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
