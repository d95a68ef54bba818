"""Where a prompt comes from: an option, a file, stdin, or what comes with kvq."""

from __future__ import annotations

import io
import os
import stat
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_formats.errors import ConfigError, DataError

if TYPE_CHECKING:
    from kvq_cli.output import Output

STDIN = "-"
HINT = '-p "TEXT", --prompt-file FILE, or text piped to stdin'


@dataclass(frozen=True)
class Prompt:
    """Text to be continued, and where it came from: ``option``, ``file``, ``stdin``, ``bundled``.

    Line ends at the end of a file or of stdin are left out, as a shell's ``$(...)`` does.
    """

    text: str
    source: str


def read_prompt(output: Output, text: str | None, file: Path | None) -> Prompt:
    """Read the prompt: ``text`` (``-`` is stdin), else ``file``, else piped stdin, else bundled.

    Raises ConfigError where two are named, DataError for one that is missing, unreadable or blank.
    """
    if text is not None and file is not None:
        raise ConfigError(
            "two prompts are given: -p and --prompt-file.", hint="leave one of them out"
        )
    if text == STDIN or (text is None and file is None and stdin_is_piped()):
        return _filled(_stdin(output), source="stdin", name="stdin")
    if text is not None:
        # Bytes that are no UTF-8 come from the shell as halves of characters.
        _decoded(os.fsencode(text), name="-p")
        return _filled(text, source="option", name="-p")
    if file is not None:
        return _filled(_file(file.expanduser()), source="file", name=str(file))
    output.note(f"no prompt is given: the bundled one is continued; yours: {HINT}")
    return Prompt(bundled_prompt(), "bundled")


def bundled_prompt() -> str:
    """A few sentences that even a small model can go on with."""
    asset = files("kvq_cli") / "assets" / "prompt.txt"
    return _without_line_end(asset.read_text(encoding="utf-8"))


def stdin_is_piped() -> bool:
    """Whether stdin is a pipe, a file or a socket: not a terminal, /dev/null or nothing at all."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    # No stdin, a closed one, or an object without a file behind it.
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _stdin(output: Output) -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise DataError("there is no stdin to read a prompt from.", hint=HINT)
    if sys.stdin.isatty():
        output.note("type the prompt; Ctrl-D on a line of its own ends it")
    else:
        output.note("the prompt is read from stdin")
    return _decoded(sys.stdin.buffer.read(), name="stdin")


def _file(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), name=str(path))
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; expected a file.", hint=HINT) from error
    except FileNotFoundError as error:
        hint = "-p - reads stdin" if str(path) == STDIN else HINT
        raise DataError(f"there is no file {path}.", hint=hint) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", hint=HINT) from error


def _decoded(data: bytes, *, name: str) -> str:
    try:
        # A byte order mark is no part of the text.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start:,}.",
            hint="save the prompt as UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(f"{name} is binary: it holds zero bytes.", hint="a file of UTF-8 text")
    return _without_line_end(io.IncrementalNewlineDecoder(None, translate=True).decode(text, True))


def _without_line_end(text: str) -> str:
    return text.rstrip("\r\n")


def _filled(text: str, *, source: str, name: str) -> Prompt:
    if not text.strip():
        raise DataError(f"the prompt from {name} is empty.", hint=HINT)
    return Prompt(text, source)
