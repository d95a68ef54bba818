"""Refuses whatever would make the host wait for a GPU, on a CPU where nothing has to wait.

Two modes of torch, because neither sees everything: operations whose result depends on numbers come
through the dispatcher, and ``tolist`` or ``numpy`` of a tensor on the CPU never get there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opaque_launches import opaque_launches

READS = frozenset(
    {
        *("tolist", "numpy", "cpu", "item", "nonzero", "equal", "allclose", "unique", "bincount"),
        *("masked_select", "argwhere", "__bool__", "__int__", "__float__", "__index__"),
        *("__array__", "is_nonzero", "synchronize"),
    }
)
"""Functions and methods that bring numbers to the host, or need them there."""

UPLOADS = frozenset({"tensor", "as_tensor", "from_numpy", "asarray"})
"""Functions that make a tensor of numbers that the host has."""

MADE = frozenset({"zeros", "ones", "full", "empty", "arange", "eye", "linspace"})
"""Functions that make a tensor where they are told to, on the CPU if they are not."""

OPERATIONS = frozenset(
    {
        *("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "allclose", "argwhere"),
    }
)


class WouldWait(AssertionError):  # noqa: N818
    """The host would have waited for the device here."""


class _Functions(TorchFunctionMode):
    def __init__(self, *, uploads: bool) -> None:
        super().__init__()
        self.uploads = uploads

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = kwargs or {}
        if name in READS:
            raise WouldWait(f"{name} reads a tensor")
        if not self.uploads and (name in UPLOADS or (name in MADE and "device" not in kwargs)):
            raise WouldWait(f"{name} makes a tensor on the host")
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.partition("::")[2]
        if name in OPERATIONS:
            raise WouldWait(f"{function} reads a tensor")
        if name in ("index", "index_put", "index_put_"):
            masks = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            if any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
                raise WouldWait(f"{function} counts what a mask selects")
        if name == "repeat_interleave" and isinstance(args[-1], Tensor):
            raise WouldWait(f"{function} adds up how often")
        return function(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(*, uploads: bool = True) -> Iterator[None]:
    """Raise WouldWait where something inside would wait for a GPU.

    ``uploads``: whether tensors may be made of numbers that the host has. In a graph they may not.
    """
    with opaque_launches(), _Functions(uploads=uploads), _Operations():
        yield
