"""The one place that prints: results on stdout, everything about them on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from kvq_formats.errors import KVQError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from kvq_cli.progress import CommandProgress

PIPE_WIDTH = 120
"""Columns of a table where stdout is a file or a pipe, so that no cell is cut."""


def switched_on(name: str) -> bool:
    """Whether an environment variable is set to something other than empty, 0, false or no."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no")


class Output:
    """What a command says, and how: text or JSON, quiet or not, with or without progress.

    Colours obey ``NO_COLOR`` and are used on a terminal only.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.quiet = False
        self.verbose = False
        self.no_progress = False
        self.json_printed = False
        self._consoles: dict[bool, Console] = {}

    def configure(self, *, as_json: bool, quiet: bool, verbose: bool, no_progress: bool) -> None:
        """Take over the global options of the command that runs."""
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        self.no_progress = no_progress or quiet
        _set_library_voice(verbose=verbose, bars=self.live)

    @property
    def live(self) -> bool:
        """Whether bars may move on stderr: a terminal, no CI, not silenced."""
        return sys.stderr.isatty() and not switched_on("CI") and not self.no_progress

    def result(self, payload: dict[str, Any], *parts: RenderableType) -> None:
        """Print the command's result: ``payload`` with ``--json``, else ``parts`` in order.

        ``payload`` names its own format under ``schema``.
        """
        if self.as_json:
            text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False)
            # Set first: where stdout is full or closed, an error belongs on stderr.
            self.json_printed = True
            print(text, flush=True)
            return
        self.show(*parts)

    def show(self, *parts: RenderableType) -> None:
        """Print parts of a result that are there already; with ``--json`` all comes at the end."""
        from rich.text import Text

        if self.as_json:
            return
        for part in parts:
            # Text is never cut or folded: it may be a path that is copied.
            self._console(stderr=False).print(
                part, highlight=False, soft_wrap=isinstance(part, Text | str)
            )

    def stream(self, text: str) -> None:
        """Print a piece of a result as soon as it is there; with ``--json`` it comes at the end."""
        if not self.as_json:
            print(text, end="", flush=True)

    def note(self, text: str) -> None:
        """Say something good to know; ``--quiet`` leaves it out."""
        if not self.quiet:
            self._say("Note: ", "dim", text)

    def warn(self, text: str) -> None:
        """Say something that the user should know even with ``--quiet``."""
        self._say("Warning: ", "yellow", text)

    def next(self, command: str) -> None:
        """Name the command that usually follows; the last line of a command."""
        if not self.quiet:
            self._say("Next: ", "bold green", command)

    def error(self, error: KVQError, *, kind: str | None = None) -> None:
        """Print a failure, as JSON on stdout or as text on stderr.

        ``kind`` is the type to report where it is not the error's own class. A command that has
        printed its JSON object says the rest on stderr: one object it is.
        """
        if self.as_json and not self.json_printed:
            described = {
                "type": kind or type(error).__name__,
                "message": error.message,
                "hint": error.hint,
            }
            self.result({"schema": "kvq.error/1", "error": described})
            return
        self._say("Error: ", "bold red", error.message)
        if error.hint:
            self._say("Hint: ", "bold", error.hint)

    def progress(self, *stages: str) -> AbstractContextManager[CommandProgress]:
        """Open the listener of the libraries' work, whose stages are ``stages`` in order."""
        from kvq_cli.progress import BarProgress, LineProgress, NoProgress

        if self.no_progress:
            return nullcontext(NoProgress())
        console = self._console(stderr=True)
        return BarProgress(console, stages) if self.live else LineProgress(console, stages)

    def _say(self, label: str, style: str, text: str) -> None:
        from rich.text import Text

        first, *rest = text.splitlines() or [""]
        body = "\n".join([first, *(" " * len(label) + line.strip() for line in rest)])
        line = Text.assemble((label, style), body)
        self._console(stderr=True).print(line, soft_wrap=True, highlight=False)

    def _console(self, *, stderr: bool) -> Console:
        from rich.console import Console

        if stderr not in self._consoles:
            stream = sys.stderr if stderr else sys.stdout
            width = None if stream.isatty() else PIPE_WIDTH
            self._consoles[stderr] = Console(file=stream, width=width)
        return self._consoles[stderr]


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
    left: int = 1,
) -> Table:
    """Plain table: the first ``left`` columns to the left, numbers to the right, nothing cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, header in enumerate(headers):
        drawn.add_column(header, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def facts(pairs: Sequence[tuple[str, str]]) -> Text:
    """Lines of two columns: what, and how much."""
    from rich.text import Text

    width = max(len(name) for name, _ in pairs)
    lines = [Text.assemble((name.ljust(width), "bold"), "  ", value) for name, value in pairs]
    return Text("\n").join(lines)


def _set_library_voice(*, verbose: bool, bars: bool) -> None:
    """Let the libraries speak with ``--verbose`` only; their bars only where ours may move.

    These variables are read when a library is first imported, hence before any command does so; a
    value that the user has set stays.
    """
    import logging

    # It warns in every layer of every forward.
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET if verbose else logging.ERROR)
    if verbose:
        from rich.logging import RichHandler

        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
