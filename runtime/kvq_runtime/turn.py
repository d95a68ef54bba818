"""One forward at a time: whose turn an attached model is."""

from __future__ import annotations

import sys
import threading

from torch import nn

from kvq_formats.errors import KVQError


class Turn:
    """Whose turn a tapped decoder is: a tap follows one forward, so one thread runs it."""

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._thread: int | None = None
        self._taking = threading.Lock()

    def take(self) -> None:
        """A forward begins in this thread.

        Raises KVQError while another thread runs one.
        """
        me = threading.get_ident()
        with self._taking:
            owner = self._thread
            if owner is not None and owner != me and _runs(owner, self._decoder):
                raise KVQError(
                    "one forward at a time: an attached model serves one thread.",
                    hint="a lock around the model, or a model for each thread",
                )
            self._thread = me

    def give_back(self) -> None:
        """A forward has ended in this thread, or was refused to it."""
        with self._taking:
            if self._thread == threading.get_ident():
                self._thread = None


def _runs(thread: int, module: nn.Module) -> bool:
    """Whether a thread is inside a call of ``module``.

    Its stack says so; hooks do not, for after Ctrl-C torch runs none.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
