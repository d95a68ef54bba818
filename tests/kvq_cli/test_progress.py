from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvq_cli.output import Output
from kvq_cli.progress import LINE_SECONDS, BarProgress, LineProgress, NoProgress


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_log_gets_a_line_a_stage_and_at_most_one_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(Console(file=stream), ("thresholds", "codebooks"), clock=clock)
    with progress.stage("thresholds", 12) as done:
        for _ in range(12):
            clock.now += LINE_SECONDS / 4
            done()
    with progress.stage("codebooks", 1) as done:
        done()
    lines = stream.getvalue().splitlines()
    assert [line.split(", peak")[0] for line in lines] == [
        "[1/2] thresholds: 4/12, about 20 s left",
        "[1/2] thresholds: 8/12, about 10 s left",
        "[1/2] thresholds: done in 30.0 s",
        "[2/2] codebooks: done in 0.0 s",
    ]


def test_a_stage_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    progress = LineProgress(Console(file=stream), ("thresholds",))
    with pytest.raises(KeyboardInterrupt), progress.stage("thresholds", 2):
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_bars_show_stage_steps_and_memory_and_vanish() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with BarProgress(console, ("thresholds",)) as progress:
        with progress.stage("thresholds", 3) as done:
            done()
            progress._bars.refresh()
        assert "thresholds" in stream.getvalue()
        assert "1/3" in stream.getvalue()
        assert "iB" in stream.getvalue()
        with progress.stage("not planned", 1) as done:
            done()
        # A stage more than planned stretches the outer bar instead of overrunning it.
        assert progress._bars.tasks[0].total == 2
        assert progress._bars.tasks[0].completed == 2
        assert len(progress._bars.tasks) == 1


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.configure(as_json=False, quiet=True, verbose=False, no_progress=False)
    with output.progress("a") as progress, progress.stage("a", 1) as done:
        done()
    assert isinstance(progress, NoProgress)
    assert capsys.readouterr().err == ""


def test_stderr_that_is_no_terminal_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.configure(as_json=True, quiet=False, verbose=False, no_progress=False)
    with output.progress("a") as progress, progress.stage("a", 1) as done:
        done()
    captured = capsys.readouterr()
    assert captured.err.startswith("[1/1] a: done in ")
    assert captured.out == ""
