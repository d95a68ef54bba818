"""Buffers that blocks of pages are decoded into, one after the other."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Memory that is kept for the next block of pages.

    Memory that is asked for anew has to be mapped anew, which on a CPU takes up to three times as
    long as decoding. One workspace serves all layers of a model: they run one after the other, and
    what a block was decoded into is read before the next is.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous tensor of any contents; overwrites what ``name`` gave before."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < size:
            # Made to be written to in every mode of torch.
            with torch.inference_mode(False), torch.no_grad():
                buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self._buffers[name, device] = buffer
        return buffer[:size].view(dtype).view(shape)
