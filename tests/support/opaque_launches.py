"""Kernels as what they are to torch: one call each, whose inside nobody sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor

Launched = Callable[[Callable[[], Any], Any], None]

_listeners: list[Launched] = []


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one launch, whatever it does: it may read tensors, as a kernel may."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            # Nor does anybody hear of launches inside of it.
            heard, _listeners[:] = list(_listeners), []
            try:
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    return function(*args, **kwargs)
            finally:
                _listeners[:] = heard

        out = call()
        for listener in _listeners:
            listener(call, out)
        return out

    return launch


@contextmanager
def opaque_launches(listener: Launched | None = None) -> Iterator[None]:
    """What Triton's interpreter does for a kernel is seen by no mode of torch.

    ``listener`` hears of each launch: what would do it again, and what it returned.
    """
    heard = [] if listener is None else [listener]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", opaque(GridExecutor.__call__))
        _listeners.extend(heard)
        try:
            yield
        finally:
            del _listeners[len(_listeners) - len(heard) :]
