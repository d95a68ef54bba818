from __future__ import annotations

import json

import pytest

from kvq_cli.output import PIPE_WIDTH, Output, facts, switched_on, table
from kvq_formats.errors import DataError


def configured(*, as_json: bool = False, quiet: bool = False) -> Output:
    output = Output()
    output.configure(as_json=as_json, quiet=quiet, verbose=False, no_progress=False)
    return output


def test_result_is_on_stdout_and_everything_else_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = configured()
    output.note("a note")
    output.warn("a warning")
    output.result({"schema": "x/1"}, "the result")
    output.next("kvq inspect")
    captured = capsys.readouterr()
    assert captured.out == "the result\n"
    assert captured.err.splitlines() == [
        "Note: a note",
        "Warning: a warning",
        "Next: kvq inspect",
    ]


def test_quiet_keeps_results_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    output = configured(quiet=True)
    output.note("a note")
    output.warn("a warning")
    output.result({"schema": "x/1"}, "the result")
    output.error(DataError("too short", hint="more text"))
    output.next("kvq inspect")
    captured = capsys.readouterr()
    assert captured.out == "the result\n"
    assert captured.err == "Warning: a warning\nError: too short\nHint: more text\n"


def test_json_result_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    configured(as_json=True).result({"schema": "x/1", "ppl": 4.5}, "a table")
    assert json.loads(capsys.readouterr().out) == {"schema": "x/1", "ppl": 4.5}


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        configured(as_json=True).result({"schema": "x/1", "ppl": float("nan")})


def test_json_error(capsys: pytest.CaptureFixture[str]) -> None:
    configured(as_json=True).error(DataError("too short", hint="more text"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "schema": "kvq.error/1",
        "error": {"type": "DataError", "message": "too short", "hint": "more text"},
    }
    assert captured.err == ""


def test_error_after_a_json_result_does_not_add_a_second_object(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = configured(as_json=True)
    output.result({"schema": "x/1"})
    output.error(DataError("a gate"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"schema": "x/1"}
    assert captured.err == "Error: a gate\n"


def test_long_messages_are_indented_and_markup_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    configured().error(DataError("found [bold]12[/bold] tokens,\nexpected 32.", hint="x " * 90))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Error: found [bold]12[/bold] tokens,", "       expected 32."]
    assert len(lines) == 3


def test_tables_cut_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "sidecar-" + "x" * 60
    output = configured()
    output.result({}, table(("name", "ppl"), [(name, "4.50 [±] 0.1")]), facts([("path", name)]))
    out = capsys.readouterr().out
    assert out.count(name) == 2
    assert "4.50 [±] 0.1" in out
    assert max(map(len, out.splitlines())) <= PIPE_WIDTH


@pytest.mark.parametrize(
    ("value", "on"), [("", False), ("0", False), ("false", False), ("No", False), ("1", True)]
)
def test_switched_on(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_DEBUG", value)
    assert switched_on("KVQ_DEBUG") is on


def test_bars_move_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    output = configured()
    assert not output.live
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert output.live
    monkeypatch.setenv("CI", "true")
    assert not output.live


def test_colour_obeys_no_color(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    configured().warn("a warning")
    assert "\x1b[33m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    configured().warn("a warning")
    assert "\x1b[33m" not in capsys.readouterr().err
