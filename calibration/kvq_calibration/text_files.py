"""Local text: ``.txt`` as it is, ``.jsonl`` and ``.parquet`` by a column of strings."""

from __future__ import annotations

import codecs
import difflib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from kvq_calibration.text_source import (
    DATASET_FLAG,
    LazyTexts,
    Purpose,
    TextSource,
    choose_text_column,
)
from kvq_formats.errors import ConfigError, DataError

_BLOCK_BYTES = 1 << 20
_KINDS = ".txt, .jsonl or .parquet"


def text_file(path: Path, *, purpose: Purpose, text_column: str | None = None) -> TextSource:
    """A local file as a source; its name is the file name, without the folders above it.

    The file is opened and its first text read, so that a wrong file is refused at once; the rest
    is read when it is needed. ``text_column`` is for ``.jsonl`` and ``.parquet``. Raises
    ``DataError`` for a file that is missing, unreadable, empty, binary or broken.
    """
    kind = path.suffix.lower()
    with _readable(path):
        if path.is_dir():
            raise DataError(
                f"{path} is a directory; expected a file: {_KINDS}",
                hint=_name_a_file_in(path, purpose),
            )
        if not path.exists():
            raise DataError(f"there is no file {path}", hint=_near_names(path))
        if kind not in _READERS:
            raise DataError(
                f"{path} has the extension {path.suffix or '(none)'}; kvq reads {_KINDS}",
                hint="save the text as UTF-8 in a .txt file",
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", hint=f"{DATASET_FLAG[purpose]} builtin")
    if kind == ".txt" and text_column is not None:
        raise ConfigError("a .txt file has no columns", hint="leave out --text-column")
    texts = LazyTexts(partial(_READERS[kind], path, text_column))
    if next(iter(texts), None) is None:
        raise DataError(f"{path} has no rows", hint=f"{DATASET_FLAG[purpose]} builtin")
    whole = kind == ".txt"
    return TextSource(
        name=path.name,
        revision=None,
        texts=texts,
        purpose=purpose,
        path=path,
        separator="" if whole else "\n\n",
        streamed=not whole,
    )


def _read_txt(path: Path, _text_column: str | None) -> Iterator[str]:
    """Blocks of the text in order; line ends become Unix ones, a byte order mark is dropped."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset, rest = 0, b""
    with _readable(path), path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            data = rest + block
            text, used = _decode(data, offset, final=not block, path=path)
            if offset == 0:
                text = text.removeprefix("\ufeff")
            yield newlines.decode(text, final=not block)
            if not block:
                return
            offset, rest = offset + used, data[used:]


def _decode(data: bytes, offset: int, *, final: bool, path: Path) -> tuple[str, int]:
    """Text and bytes used of ``data``, which starts at byte ``offset`` of the file."""
    hint = "save the text as UTF-8"
    if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        utf8 = f"{path.stem}-utf8.txt"
        raise DataError(
            f"{path} is not UTF-8: byte 0 starts UTF-16",
            hint=f"iconv -f UTF-16 -t UTF-8 {quote(str(path))} > {quote(utf8)}",
        )
    nul = data.find(0)
    if nul >= 0:
        raise DataError(f"{path} is not text: NUL at byte {offset + nul}", hint=hint)
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{path} is not UTF-8: byte {at} is 0x{data[error.start]:02x}", hint=hint
        ) from error


def _read_jsonl(path: Path, text_column: str | None) -> Iterator[str]:
    """The text of each line; empty lines are skipped, a bad line is named by its number."""
    column: str | None = None
    with _readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where} is not UTF-8: byte {error.start} of the line is "
                    f"0x{line[error.start]:02x}",
                    hint="save the text as UTF-8",
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where} is not JSON: {error.msg} at column {error.colno}",
                    hint="a .jsonl file holds one JSON object a line",
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{where} holds {type(row).__name__}, expected a JSON object",
                    hint='write each text as {"text": "..."}',
                )
            if column is None:
                column = choose_text_column(
                    _string_columns(row), text_column=text_column, source_name=str(path)
                )
            text = row.get(column)
            if not isinstance(text, str):
                raise DataError(
                    f"{where} holds no string in {column!r}; its columns: {', '.join(row)}",
                    hint="--text-column names the column of strings",
                )
            yield text


def _read_parquet(path: Path, text_column: str | None) -> Iterator[str]:
    """The text of each row, batch by batch; a null is an empty text."""
    import pyarrow as pa
    from pyarrow import parquet, types

    try:
        with _readable(path), path.open("rb") as file, parquet.ParquetFile(file) as table:
            strings = {
                field.name: types.is_string(field.type) or types.is_large_string(field.type)
                for field in table.schema_arrow
            }
            column = choose_text_column(strings, text_column=text_column, source_name=str(path))
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a sound parquet file: {str(error).splitlines()[0]}",
            hint="write the file again",
        ) from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _string_columns(row: Mapping[str, Any]) -> dict[str, bool]:
    return {column: isinstance(value, str) for column, value in row.items()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a file into a ``DataError``."""
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"{path} cannot be read: permission denied", hint=f"chmod u+r {path}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _name_a_file_in(directory: Path, purpose: Purpose) -> str | None:
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in _READERS)
    return f"{DATASET_FLAG[purpose]} {files[0]}" if files else None


def _near_names(path: Path) -> str | None:
    """The file in the same folder whose name is most like the one that was asked for."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = [other.name for other in path.parent.iterdir() if other.is_file()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else None
