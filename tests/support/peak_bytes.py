"""The most bytes of tensors that were alive at once, counted operation by operation.

What the profiler cannot say on the CPU: a peak. Every storage that an operation makes is counted
until it is freed; memory that a kernel takes and gives back within itself is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Bytes of storages that were made inside, alive now and at the worst moment.

    Fields:
        live, peak: bytes.
        worst: names of the operation at the peak, for whoever looks for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.worst = ""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _counts(x)}
        for tensor in tree_leaves(result):
            # What is a view of what was there before, or was written to, is not new.
            if _counts(tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        if self.live > self.peak:
            self.peak, self.worst = self.live, str(func)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += count
        weakref.finalize(storage, self._free, key, count)

    def _free(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count


def _counts(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_meta
