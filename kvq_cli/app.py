"""The command line: its commands, and what becomes of an error.

Exit codes: 0 done, 1 expected failure, 2 usage, 3 a bar that the user set was missed or the doctor
found a problem, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from kvq_cli.commands.calibrate import calibrate
from kvq_cli.commands.demo import demo
from kvq_cli.commands.doctor import doctor
from kvq_cli.commands.env import env
from kvq_cli.commands.eval import evaluate
from kvq_cli.commands.generate import generate
from kvq_cli.commands.inspect import inspect
from kvq_cli.options import environment_name
from kvq_cli.output import Output, switched_on
from kvq_formats.errors import KVQError, OutputError

INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM

app = typer.Typer(
    name="kvq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Docs: docs/quickstart.md · Start with: kvq demo",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from kvq_formats.sidecar_header import FORMAT_VERSION

        typer.echo(f"kvq {version('kvq')} (sidecar format {FORMAT_VERSION})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the package and the format version.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Shrink the key/value cache of a language model to 2-4 bits a number.

    kvq measures a model on sample text once, writes what it learned into a
    small sidecar, and says what running with that sidecar costs.

    [bold]Examples[/bold]
      kvq demo
      kvq calibrate Qwen/Qwen3-0.6B --bits 3
      kvq eval --ppl wikitext2
      kvq generate --context 32k
    """


app.command("calibrate", epilog="Docs: docs/cli.md · Next: kvq inspect, kvq eval")(calibrate)
app.command("inspect", epilog="Docs: docs/cli.md · See also: kvq eval")(inspect)
app.command("eval", epilog="Docs: docs/cli.md · Next: kvq generate")(evaluate)
app.command("generate", epilog="Docs: docs/cli.md · See also: kvq calibrate, kvq eval")(generate)
app.command("demo", epilog="Docs: docs/quickstart.md · Next: kvq calibrate")(demo)
app.command("doctor", epilog="Docs: docs/troubleshooting.md · Next: kvq calibrate")(doctor)
app.command("env", epilog="Docs: docs/troubleshooting.md · See also: kvq --version")(env)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Until a command has read its options, this is how an error knows what to look like.
    output = Output(as_json="--json" in arguments or switched_on(environment_name("--json")))
    try:
        # Typer prints usage errors itself, beautifully; as JSON they are ours to print.
        with _terminable():
            code = app(arguments, prog_name="kvq", obj=output, standalone_mode=not output.as_json)
    except SystemExit as ending:
        code = ending.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer.TyperException as error:
        output.error(KVQError(error.format_message(), hint="kvq --help"), kind="UsageError")
        code = error.exit_code
    except BrokenPipeError:
        code = _reader_left()
    except Exception as error:
        code = _report(error, output)
    if code == INTERRUPTED:
        interrupted = KVQError("interrupted; nothing half-written is left behind.")
        output.error(interrupted, kind="Interrupted")
    if code == TERMINATED:
        terminated = KVQError("terminated; nothing half-written is left behind.")
        output.error(terminated, kind="Terminated")
    sys.exit(code or 0)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that temporary folders are removed.

    Without a handler the process ends on the spot. One that is there already stays, an ignored
    signal stays ignored, and only the main thread may set any.
    """

    def leave(number: int, frame: object) -> None:
        # A second one must not cut the cleaning up short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _reader_left() -> int:
    """The reader of stdout has closed it (``| head``): nothing to say, and nobody to say it to."""
    # Python flushes stdout when it ends, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _report(error: Exception, output: Output) -> int:
    """Print an error; known ones in a sentence, others with their traceback. Returns the code."""
    known = error if isinstance(error, KVQError) else _explain(error)
    if known is None or switched_on("KVQ_DEBUG"):
        traceback.print_exception(error)
    if known is None:
        known = KVQError(
            f"unexpected {type(error).__name__}: {error}",
            hint="this is a bug in kvq: please report it with the traceback and `kvq env --json`",
        )
        output.error(known, kind=type(error).__name__)
    else:
        output.error(known)
    return known.exit_code


def _explain(error: Exception) -> KVQError | None:
    """Turn what any command can run into, wherever it happens, into one sentence."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = os.fspath(error.filename) if error.filename else "the output"
        return OutputError(
            f"no space left on the disk while writing {place}.",
            hint="free some space or choose another disk with -o",
        )
    # torch is not imported for the sake of an error: its exceptions are known by name.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        where = "" if isinstance(error, MemoryError) else "GPU "
        return KVQError(
            f"out of {where}memory: {str(error).splitlines()[0] if str(error) else 'no details'}",
            hint="--batch-size 1, a shorter --seq-len, or --device-map auto",
        )
    return None
