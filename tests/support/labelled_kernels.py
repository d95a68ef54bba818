"""Triton kernels on pretended devices: the interpreter runs them on the numbers.

As on CUDA, what a kernel is given lies on the device that is current, all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from kvq_kernels import launch
from labelled_devices import NAME, LabelledTensor, labelled_devices

_current: list[torch.device] = [torch.device(NAME, 0)]


@contextmanager
def labelled_kernels() -> Iterator[None]:
    """``labelled_devices``, and kernels that take its tensors: the portable ones."""
    run = GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        for place, value in enumerate((*args, *kwargs.values())):
            _check(value, f"Pointer argument (at {place}) of {executor.fn.__name__}")
        plain = {name: _plain(value) for name, value in kwargs.items()}
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            run(executor, *map(_plain, args), **plain)

    properties = SimpleNamespace(multi_processor_count=1)
    with pytest.MonkeyPatch.context() as patch, labelled_devices():
        patch.setattr(GridExecutor, "__call__", launched)
        patch.setattr(torch.cuda, "device", _on)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (0, 0))
        try:
            yield
        finally:
            for known in (launch.multiprocessors, launch.architecture):
                known.cache_clear()


def _on(device: torch.device) -> AbstractContextManager[None]:
    @contextmanager
    def entered() -> Iterator[None]:
        _current.append(device)
        try:
            yield
        finally:
            _current.pop()

    return entered()


def _check(value: Any, name: str) -> None:
    """Raise as Triton does for a pointer to the host, and where CUDA would read another device."""
    if not isinstance(value, Tensor):
        return
    if type(value) is not LabelledTensor:
        raise ValueError(f"{name} cannot be accessed from Triton (cpu tensor?)")
    if value.device != _current[-1]:
        raise RuntimeError(f"{name} is on {value.device}, the kernel runs on {_current[-1]}")


def _plain(value: Any) -> Any:
    return value.inner if type(value) is LabelledTensor else value
