"""Errors, exit codes and imports, whatever the command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvq
from kvq_formats.errors import ConfigError, DataError, GateMissedError

HEAVY = {"torch", "transformers", "pydantic", "datasets", "numpy", "sklearn", "huggingface_hub"}
COMMANDS = ("calibrate", "inspect", "eval", "demo", "env")

Fail = Callable[[BaseException], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let the work of ``kvq env`` fail: the way out is the same for all commands."""

    def with_error(error: BaseException) -> None:
        def collect() -> dict[str, Any]:
            raise error

        monkeypatch.setattr("kvq_cli.commands.env.collect", collect)

    return with_error


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (DataError("too short", hint="more text"), 1, "DataError", "too short"),
        (ConfigError("bits is 9", hint="--bits 4"), 2, "ConfigError", "bits is 9"),
        (GateMissedError("kl is 1", hint="bits"), 3, "GateMissedError", "kl is 1"),
        (KeyboardInterrupt(), 130, "Interrupted", "nothing half-written"),
        (ValueError("unforeseen"), 1, "ValueError", "unexpected ValueError: unforeseen"),
        (OSError(errno.ENOSPC, "full", "/q"), 1, "OutputError", "no space left on the disk"),
        (MemoryError(), 1, "KVQError", "out of memory"),
    ],
)
def test_exit_codes_and_errors(
    kvq: Kvq, fail: Fail, error: BaseException, code: int, kind: str, message: str
) -> None:
    fail(error)
    plain = kvq("env")
    assert (plain.code, plain.stdout) == (code, "")
    assert "Error: " in plain.stderr
    assert message in plain.stderr
    as_json = kvq("env", "--json")
    assert as_json.code == code
    assert as_json.json["schema"] == "kvq.error/1"
    assert as_json.json["error"]["type"] == kind
    assert message in as_json.json["error"]["message"]


@pytest.fixture
def handler_inside(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is set for SIGTERM while ``kvq env`` works."""
    seen: list[Any] = []

    def look() -> dict[str, Any]:
        seen.append(signal.getsignal(signal.SIGTERM))
        raise DataError("seen")

    monkeypatch.setattr("kvq_cli.commands.env.collect", look)
    return seen


def test_sigterm_is_handled_only_while_a_command_runs(kvq: Kvq, handler_inside: list[Any]) -> None:
    kvq("env")
    assert callable(handler_inside[0])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_choice_that_was_made_for_sigterm_stays(kvq: Kvq, handler_inside: list[Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        kvq("env")
        assert handler_inside == [signal.SIG_IGN]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_beside_the_main_thread_no_handler_is_set(kvq: Kvq, handler_inside: list[Any]) -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(kvq, "env").result().code == 1
    assert handler_inside == [signal.SIG_DFL]


def test_a_gpu_out_of_memory_is_explained(kvq: Kvq, fail: Fail) -> None:
    import torch

    fail(torch.OutOfMemoryError("tried to allocate 9.1 GiB\nmore lines"))
    ran = kvq("env")
    assert ran.code == 1
    assert "Error: out of GPU memory: tried to allocate 9.1 GiB\n" in ran.stderr
    assert "Hint: --batch-size 1" in ran.stderr


def test_what_is_not_expected_keeps_its_traceback(kvq: Kvq, fail: Fail) -> None:
    fail(ValueError("unforeseen"))
    ran = kvq("env")
    assert "Traceback (most recent call last)" in ran.stderr
    assert "kvq env --json" in ran.stderr


def test_expected_failures_show_a_traceback_only_when_asked(
    kvq: Kvq, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(DataError("too short"))
    assert "Traceback" not in kvq("env").stderr
    monkeypatch.setenv("KVQ_DEBUG", "1")
    assert "Traceback" in kvq("env").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "--bitz", "3"),
        ("calibrate", "--bits", "three"),
        ("calibrate", "--num-samples", "0"),
        ("calibrate", "--dtype", "float8"),
        ("calibrate", "a", "b"),
        ("calibrate", "a", "--model", "b"),
        ("nonsense",),
    ],
)
def test_usage_errors_are_two(kvq: Kvq, arguments: tuple[str, ...]) -> None:
    plain = kvq(*arguments)
    assert (plain.code, plain.stdout) == (2, "")
    assert "Usage: kvq" in plain.stderr
    as_json = kvq(*arguments, "--json")
    assert as_json.code == 2
    assert as_json.json["error"]["type"] == "UsageError"


def test_a_misspelt_option_is_suggested(kvq: Kvq) -> None:
    assert "--seq-len" in kvq("calibrate", "--seq-length", "4").stderr


def test_json_may_be_asked_for_by_the_environment(
    kvq: Kvq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQ_JSON", "1")
    assert kvq("env").json["schema"] == "kvq.env/1"
    assert kvq("calibrate", "--bitz").json["error"]["type"] == "UsageError"


def test_version(kvq: Kvq) -> None:
    from importlib.metadata import version

    ran = kvq("--version")
    assert ran.code == 0
    assert ran.stdout == f"kvq {version('kvq')} (sidecar format 1)\n"


def test_without_a_command_help_is_shown(kvq: Kvq) -> None:
    ran = kvq()
    assert ran.code == 2
    assert "calibrate" in ran.stdout + ran.stderr


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command: str | None) -> None:
    arguments = [*([command] if command else []), "--help"]
    script = (
        "import sys\n"
        "from kvq_cli.app import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as ending:\n"
        "    assert ending.code == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage: kvq" in ran.stdout
    # Typer itself reads the options of a single command with pydantic.
    allowed = {"pydantic"} if command else set()
    assert HEAVY & set(ran.stderr.split()) <= allowed


def test_the_installed_command_runs() -> None:
    program = Path(sys.executable).with_name("kvq")
    ran = subprocess.run(
        [program, "inspect", "nowhere", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error::ResourceWarning"},
    )
    assert ran.returncode == 1
    assert '"type": "SidecarError"' in ran.stdout
    assert ran.stderr == ""


def test_importing_the_library_imports_nothing_heavy() -> None:
    script = "import kvq, sys; print(*{name.split('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(ran.stdout.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_error_on_stderr() -> None:
    command = [sys.executable, "-c", "from kvq_cli.app import main; main(['env', '--json'])"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.stderr.startswith("Error: no space left on the disk")
    assert "Traceback" not in ran.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from kvq_cli.app import main; main(['env', '--json'])"]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "")
