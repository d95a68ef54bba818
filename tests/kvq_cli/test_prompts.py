from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvq_cli.output import Output
from kvq_cli.prompts import bundled_prompt, read_prompt, stdin_is_piped
from kvq_formats.errors import ConfigError, DataError

TEXT = "Das Haus.\nThe house; ein schönes 家"


@contextmanager
def stdin_of(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with os.fdopen(descriptor, "r", encoding="ascii") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", stream)
        yield


def pipe_with(data: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


def socket_with(data: bytes) -> int:
    ours, theirs = socket.socketpair()
    ours.sendall(data)
    ours.close()
    return theirs.detach()


@pytest.fixture
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stdin_of(os.open(os.devnull, os.O_RDONLY), monkeypatch):
        yield


@pytest.mark.usefixtures("no_stdin")
def test_an_option_is_taken_as_it_is() -> None:
    prompt = read_prompt(Output(), "Once upon a time\n", None)
    assert (prompt.text, prompt.source) == ("Once upon a time\n", "option")


@pytest.mark.usefixtures("no_stdin")
def test_a_file_without_its_last_line_end_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (TEXT + "\n\n").replace("\n", "\r\n").encode())
    prompt = read_prompt(Output(), None, path)
    assert (prompt.text, prompt.source) == (TEXT, "file")


@pytest.mark.parametrize("option", [None, "-"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "file"])
def test_piped_stdin(
    kind: str, option: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = f"{TEXT}\n".encode()
    if kind == "file":
        (tmp_path / "in").write_bytes(data)
        descriptor = os.open(tmp_path / "in", os.O_RDONLY)
    else:
        descriptor = pipe_with(data) if kind == "pipe" else socket_with(data)
    with stdin_of(descriptor, monkeypatch):
        prompt = read_prompt(Output(), option, None)
    # Read as UTF-8, whatever the locale says.
    assert (prompt.text, prompt.source) == (TEXT, "stdin")
    assert "read from stdin" in capsys.readouterr().err


def test_what_is_named_wins_over_a_pipe_that_happens_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("from the file")
    # Nothing is ever written to the pipe: reading it would not end.
    reading, writing = os.pipe()
    with stdin_of(reading, monkeypatch):
        assert read_prompt(Output(), "given", None).text == "given"
        assert read_prompt(Output(), None, tmp_path / "prompt.txt").text == "from the file"
    os.close(writing)


def test_a_slow_writer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb", buffering=0) as stream:
            for part in (b"one ", b"two ", b"three"):
                stream.write(part)

    writer = threading.Thread(target=write)
    with stdin_of(reading, monkeypatch):
        writer.start()
        assert read_prompt(Output(), None, None).text == "one two three"
    writer.join()


@pytest.mark.usefixtures("no_stdin")
def test_without_any_the_bundled_prompt_is_used_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = read_prompt(Output(), None, None)
    assert (prompt.text, prompt.source) == (bundled_prompt(), "bundled")
    assert prompt.text == prompt.text.strip()
    assert len(prompt.text.split()) > 20
    assert "no prompt is given: the bundled one" in capsys.readouterr().err


def test_a_terminal_is_no_pipe_and_is_read_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    controller, terminal = os.openpty()
    with stdin_of(terminal, monkeypatch):
        assert not stdin_is_piped()
        assert read_prompt(Output(), None, None).source == "bundled"
        os.write(controller, b"typed\n\x04")
        assert read_prompt(Output(), "-", None).text == "typed"
    os.close(controller)
    assert "Ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize("stdin", [None, io.StringIO("text")])
def test_what_has_no_file_behind_it_is_no_pipe(
    stdin: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    assert not stdin_is_piped()
    assert read_prompt(Output(), None, None).source == "bundled"


def test_stdin_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="there is no stdin"):
        read_prompt(Output(), "-", None)


def test_two_prompts_are_refused(tmp_path: Path) -> None:
    for text in ("given", "-"):
        with pytest.raises(ConfigError, match="-p and --prompt-file") as caught:
            read_prompt(Output(), text, tmp_path / "prompt.txt")
        assert caught.value.exit_code == 2
        assert caught.value.hint


@pytest.mark.usefixtures("no_stdin")
@pytest.mark.parametrize("blank", ["", " ", "\n\n", "\t \n"])
def test_blank_prompts_are_refused(blank: str, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(blank)
    for text, file, name in ((blank, None, "-p"), (None, tmp_path / "blank.txt", "blank.txt")):
        with pytest.raises(DataError, match=f"the prompt from .*{name} is empty") as caught:
            read_prompt(Output(), text, file)
        assert "--prompt-file" in (caught.value.hint or "")


def test_a_blank_stdin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        stdin_of(pipe_with(b"\n"), monkeypatch),
        pytest.raises(DataError, match="from stdin is empty"),
    ):
        read_prompt(Output(), None, None)


@pytest.mark.usefixtures("no_stdin")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.txt", "there is no file .*nowhere.txt"),
        ("folder", "folder is a folder; expected a file"),
        ("latin1.txt", "latin1.txt is not UTF-8 text: byte 0xe4 at 1"),
        ("binary.txt", "binary.txt is binary"),
        ("utf16.txt", "utf16.txt is not UTF-8 text: byte 0xff at 0"),
        ("latin1.txt/prompt", "latin1.txt/prompt cannot be read"),
    ],
)
def test_files_that_are_no_prompt(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1.txt").write_bytes("Bär".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=message) as caught:
        read_prompt(Output(), None, tmp_path / name)
    assert caught.value.hint
    assert caught.value.exit_code == 1


def test_stdin_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        stdin_of(pipe_with(b"B\xe4r"), monkeypatch),
        pytest.raises(DataError, match="stdin is not UTF-8"),
    ):
        read_prompt(Output(), None, None)
