"""Where text comes from: its name, its revision, and the texts, read only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvq_formats.errors import DataError

Purpose = Literal["calibrate", "eval"]

# The option that names the text, for hints.
DATASET_FLAG: dict[Purpose, str] = {"calibrate": "--dataset", "eval": "--ppl"}


@dataclass(frozen=True)
class TextSource:
    """Text for one purpose.

    ``texts`` may be read more than once and may be lazy: a streamed data set of any size costs only
    what is taken from it. The whole text is ``separator.join(texts)``. ``streamed`` says that
    reading on is costly, so that calibration takes only the beginning. ``notes`` are lines for
    people. ``path`` is a local file as it was given; ``name``, which sidecars keep, has no folders.
    """

    name: str
    revision: str | None
    texts: Iterable[str]
    purpose: Purpose
    separator: str = "\n\n"
    streamed: bool = False
    notes: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def label(self) -> str:
        """What errors call it: a file by its path, anything else by its name."""
        return self.name if self.path is None else str(self.path)


@dataclass(frozen=True)
class LazyTexts:
    """Texts that are opened anew for each reading: ``read`` starts from the beginning."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()


def choose_text_column(
    is_text: Mapping[str, bool], *, text_column: str | None, source_name: str
) -> str:
    """The column to read: the one asked for, else ``text``, else the only column of strings.

    ``is_text`` maps each column to whether it holds strings. Raises ``DataError`` with the columns
    when the choice is not clear.
    """
    columns = ", ".join(is_text) or "none"
    strings = [column for column, holds_text in is_text.items() if holds_text]
    hint = (
        f"--text-column {strings[0]}"
        if strings
        else "write each text as a string, in a column named text"
    )
    if text_column is not None:
        if text_column not in is_text:
            raise DataError(
                f"{source_name} has no column {text_column!r}; its columns: {columns}", hint=hint
            )
        if not is_text[text_column]:
            raise DataError(
                f"column {text_column!r} of {source_name} does not hold strings; "
                f"columns that do: {', '.join(strings) or 'none'}",
                hint=hint,
            )
        return text_column
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    found = "several columns of strings" if strings else "no column of strings"
    raise DataError(
        f"{source_name} has no column of strings named 'text', and {found}; its columns: {columns}",
        hint=hint,
    )
