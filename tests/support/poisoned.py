"""Buffers whose bytes are wrong until somebody writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvq_kernels.workspace import Workspace


class PoisonedWorkspace(Workspace):
    """Gives buffers full of NaN, so that what a kernel forgets to write is seen."""

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        buffer = super().take(name, shape, dtype, device)
        if buffer.dtype.is_floating_point:
            return buffer.fill_(torch.nan)
        return buffer.fill_(torch.iinfo(dtype).max)


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN inside: torch does so where results must be deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
