"""Buffers whose bytes are wrong until somebody writes them."""

from __future__ import annotations

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
