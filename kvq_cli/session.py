"""The current sidecar: what ``kvq calibrate`` wrote last, so that the next command finds it.

A small JSON file under kvq's cache folder: ``KVQ_CACHE``, else a folder among Hugging Face's
cached assets, which follows ``HF_HOME``.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq_cli.options import sidecars_in_environment
from kvq_formats.errors import ConfigError, OutputError, SidecarError

if TYPE_CHECKING:
    from kvq_cli.output import Output

SCHEMA = "kvq.session/1"
STATE_NAME = "current-sidecar.json"
CALIBRATE_HINT = "kvq calibrate MODEL --bits 3, or name a sidecar that you have"


def cache_folder() -> Path:
    """Kvq's cache folder; may not exist yet."""
    if chosen := os.environ.get("KVQ_CACHE"):
        return Path(chosen).expanduser().absolute()
    from huggingface_hub.constants import HF_ASSETS_CACHE

    return Path(HF_ASSETS_CACHE) / "kvq"


def check_file(path: Path, *, schema: str) -> Path:
    """Say whether a file can be written, before the costly work starts; raises OutputError.

    A file that exists is replaced only if it is empty or JSON of the same ``schema``: what ``-o``
    names by mistake is a text or a sidecar.
    """
    path = path.expanduser()
    existing = path.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if path.is_dir() or not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "is a folder" if path.is_dir() else f"cannot be written in {existing}"
        raise OutputError(f"{path} {what}; expected a file to write to.", hint="-o results.json")
    if path.is_file() and path.stat().st_size and _schema(path) != schema:
        raise OutputError(
            f"{path} exists and holds something else; kvq replaces only results of its own.",
            hint="-o another file",
        )
    return path


def _schema(path: Path) -> object:
    """What a JSON file says that it is; None if it is no such file."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document.get("schema") if isinstance(document, dict) else None


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; raises OutputError where that fails."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as stream:
            temporary = Path(stream.name)
            json.dump(payload, stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}.",
            hint="free some space or choose another place with -o",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def new_results_file() -> Path:
    """Where raw results go without ``-o``: a file of its own for each run."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return cache_folder() / "results" / f"eval-{stamp}-{secrets.token_hex(2)}.json"


def remember(sidecar: Path, output: Output) -> None:
    """Make a sidecar the current one; a cache that cannot be written costs only a warning."""
    try:
        payload = {"schema": SCHEMA, "sidecar": str(sidecar.expanduser().absolute())}
        write_json(cache_folder() / STATE_NAME, payload)
    except OutputError as error:
        output.warn(f"{error.message} The next command needs --sidecar {sidecar}.")


def recall() -> Path | None:
    """Return the current sidecar's path; None if there is none or its state makes no sense."""
    try:
        state = json.loads((cache_folder() / STATE_NAME).read_text(encoding="utf-8"))
        return Path(state["sidecar"]) if state["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def current_sidecar(output: Output) -> Path:
    """Return the path of the current sidecar and say which one it is.

    Raises SidecarError if nothing was calibrated yet or the folder is gone.
    """
    path = recall()
    if path is None:
        raise SidecarError("no sidecar is named, and none was made yet.", hint=CALIBRATE_HINT)
    if not path.exists():
        raise SidecarError(f"the current sidecar, {path}, is no longer there.", hint=CALIBRATE_HINT)
    output.note(f"using the current sidecar, {path}")
    return path


def one_sidecar(output: Output, given: Sequence[str] | None) -> str:
    """The sidecar of a command that takes one: what ``--sidecar`` names, else the current one.

    Of several in KVQ_SIDECAR the first is taken, with a note; several flags raise ConfigError.
    """
    if not given:
        return str(current_sidecar(output))
    if len(given) > 1 and list(given) != sidecars_in_environment():
        raise ConfigError(
            f"--sidecar is given {len(given)} times; this command runs with one.",
            hint=f"--sidecar {given[0]}",
        )
    if len(given) > 1:
        output.note(f"KVQ_SIDECAR names {len(given)} sidecars; this is the first")
    return given[0]
