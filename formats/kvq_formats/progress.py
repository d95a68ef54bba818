"""How long work says how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener: the command line draws bars, a library caller hears nothing."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a stage of ``total`` steps; the callable that it yields marks one as done."""
        ...


class SilentProgress:
    """The listener of those who do not want to know."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Yield a callable that does nothing."""
        yield lambda: None
