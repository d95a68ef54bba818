"""Three listeners of ``kvq_formats.progress``: bars on a terminal, lines in a log, silence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from kvq_cli.peak_memory import peak_memory
from kvq_formats.progress import SilentProgress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console

LINE_SECONDS = 10.0
"""A log gets one line a stage, and within a stage at most one in this time."""


class CommandProgress(Protocol):
    """The listener that a command hands to the libraries."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """See ``kvq_formats.progress.Progress``."""
        ...


class NoProgress(SilentProgress):
    """Nothing at all: ``--quiet`` and ``--no-progress``."""


class Titled:
    """A listener that hears each stage's name with a title behind it, such as a text's."""

    def __init__(self, listener: CommandProgress, title: str) -> None:
        self._listener = listener
        self._title = title

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Pass the stage on under its longer name."""
        return self._listener.stage(f"{name} {self._title}", total)


class BarProgress:
    """Two moving bars on a terminal: stages outside, steps inside, with ETA and peak memory.

    They vanish at the end, so that only results stay on the screen.
    """

    def __init__(self, console: Console, stages: Sequence[str]) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("peak {task.fields[memory]}", style="dim"),
            console=console,
            transient=True,
        )
        self._outer = self._bars.add_task("stages", total=max(len(stages), 1), memory="")
        self._opened = 0
        self._planned = len(stages)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Show an inner bar of ``total`` steps while the stage lasts."""
        self._opened += 1
        # Not before: until the first stage the libraries may show bars of downloads.
        self._bars.start()
        self._bars.update(self._outer, total=max(self._planned, self._opened), memory=peak_memory())
        inner = self._bars.add_task(f"  {name}", total=total, memory=peak_memory())

        def done() -> None:
            self._bars.update(inner, advance=1, memory=peak_memory())

        try:
            yield done
        finally:
            self._bars.remove_task(inner)
            self._bars.update(self._outer, advance=1, memory=peak_memory())


class LineProgress:
    """Plain lines, for logs: one at a stage's end, and one every 10 s within."""

    def __init__(
        self,
        console: Console,
        stages: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._planned = len(stages)
        self._opened = 0
        self._clock = clock
        self._last_line = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Print where the stage is, now and then, and that it is done."""
        self._opened += 1
        label = f"[{self._opened}/{max(self._planned, self._opened)}] {name}"
        started, steps = self._clock(), 0

        def done() -> None:
            nonlocal steps
            steps += 1
            now = self._clock()
            if steps < total and now - self._last_line >= LINE_SECONDS:
                left = (now - started) / steps * (total - steps)
                self._line(f"{label}: {steps}/{total}, about {left:.0f} s left")

        yield done
        self._line(f"{label}: done in {self._clock() - started:.1f} s, peak {peak_memory()}")

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
        self._last_line = self._clock()
