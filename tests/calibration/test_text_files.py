"""Local text files: what is read, and what is said of files that cannot be read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from kvq_calibration import text_files
from kvq_calibration.text_files import text_file
from kvq_formats.errors import ConfigError, DataError


def read(path: Path, **options: Any) -> str:
    source = text_file(path, purpose="calibrate", **options)
    return source.separator.join(source.texts)


def refusal(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return caught.value


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_txt_is_read_whole_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo é\n".encode())
    source = text_file(path, purpose="eval")
    assert "".join(source.texts) == "one\ntwo é\n"
    assert "".join(source.texts) == "one\ntwo é\n"
    assert source.name == "a.txt"
    assert source.separator == ""
    assert not source.streamed


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_blocks_may_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    text = "ab\r\ncé\r€\n\r\n🙂end"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    assert read(path) == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("block", [4, 1 << 20])
def test_bad_bytes_are_named_by_their_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes("é12345".encode() + b"\xff tail")
    assert "not UTF-8: byte 7 is 0xff" in refusal(path).message
    path.write_bytes("é12345".encode() + b"\x00 tail")
    assert "NUL at byte 7" in refusal(path).message
    path.write_bytes(b"cut \xe2\x82")
    assert "byte 4 is 0xe2" in refusal(path).message


def test_utf16_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello", encoding="utf-16")
    error = refusal(path)
    assert "UTF-16" in error.message
    assert error.hint is not None
    assert "iconv" in error.hint


def test_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    error = refusal(tmp_path / "note.txt")
    assert "there is no file" in error.message
    assert error.hint == f"did you mean {tmp_path / 'notes.txt'}?"
    assert refusal(tmp_path / "zzzzzzzz.txt").hint is None
    assert "no folder" in str(refusal(tmp_path / "nowhere" / "note.txt").hint)


def test_directory_names_a_file_inside(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    error = refusal(tmp_path)
    assert "is a directory" in error.message
    assert error.hint == f"--dataset {tmp_path / 'notes.txt'}"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty" in refusal(tmp_path / name).message


def test_unknown_extension(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    assert ".txt, .jsonl or .parquet" in refusal(tmp_path / "a.pdf").message


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def denied(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    # A mode of 000 would not stop a superuser.
    monkeypatch.setattr(Path, "open", denied)
    error = refusal(path)
    assert "permission denied" in error.message
    assert error.hint == f"chmod u+r {path}"


def test_txt_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="no columns"):
        text_file(tmp_path / "a.txt", purpose="eval", text_column="text")


def test_jsonl_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "one"}, {"text": "two"}])
    assert read(path) == "one\n\ntwo"
    assert text_file(path, purpose="calibrate").streamed
    path = write_jsonl(tmp_path / "b.jsonl", [{"n": 1, "body": "one"}])
    assert read(path) == "one"
    path = write_jsonl(tmp_path / "c.jsonl", [{"title": "t", "body": "one", "n": 2}])
    assert read(path, text_column="body") == "one"
    assert "title, body, n" in refusal(path).message
    assert "title, body, n" in refusal(path, text_column="text").message
    assert "does not hold strings" in refusal(path, text_column="n").message


@pytest.mark.parametrize("options", [{}, {"text_column": "text"}])
def test_jsonl_without_any_string_says_what_a_row_should_hold(
    tmp_path: Path, options: dict[str, str]
) -> None:
    error = refusal(write_jsonl(tmp_path / "a.jsonl", [{"text": 3}]), **options)
    assert error.hint == "write each text as a string, in a column named text"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "line 3 of {path} is not JSON"),
        (b'["text"]', "line 3 of {path} holds list"),
        (b'{"other": "x"}', "line 3 of {path} holds no string in 'text'; its columns: other"),
        (b'{"text": 3}', "line 3 of {path} holds no string"),
        (b'{"text": "\xff"}', "line 3 of {path} is not UTF-8: byte 10"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    assert words.format(path=path) in refusal(path).message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""), ("a.txt", b"\xff"), ("a.txt", b"\0"), ("a.txt", b"\xff\xfe"),
        ("a.csv", b"x"),
        ("a.jsonl", b"\n"), ("a.jsonl", b"{"), ("a.jsonl", b"[]"), ("a.jsonl", b"\xff"),
        ("a.jsonl", b'{"n": 1}'), ("a.jsonl", b'{"text": ""}\n{}'), ("a.parquet", b"x"),
    ],
)  # fmt: skip
def test_errors_name_the_path_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("some folder") / name
    path.parent.mkdir()
    path.write_bytes(content)
    assert str(path) in refusal(path).message
    assert str(tmp_path) not in refusal(path).message


def test_jsonl_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbroken\n')
    source = text_file(path, purpose="calibrate")
    assert list(itertools.islice(iter(source.texts), 1)) == ["one"]


def test_jsonl_of_blank_lines_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "has no rows" in refusal(tmp_path / "a.jsonl").message


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": [1, 2, 3], "body": ["one", None, "three"]}), path)
    assert read(path) == "one\n\n\n\nthree"
    assert "its columns: n, body" in refusal(path, text_column="text").message


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "has no rows" in refusal(path).message


@pytest.fixture
def damaged_parquet(tmp_path: Path) -> Path:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["some text"] * 500}), path)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def test_damaged_parquet(damaged_parquet: Path) -> None:
    assert "a.parquet" in refusal(damaged_parquet).message
