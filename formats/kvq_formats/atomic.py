"""Write a small folder whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kvq_formats.errors import OutputError

STAGE_PREFIX = ".kvq-"


def check_folder(
    directory: str | os.PathLike[str], *, markers: Collection[str], overwrite: bool = False
) -> Path:
    """Say whether a folder can be written, before the costly work starts; creates nothing.

    A folder that exists must be empty, or hold one of the ``markers`` (file names) and be given
    up by ``overwrite``. Returns the absolute path; raises OutputError.
    """
    path = Path(directory).expanduser().absolute()
    with explained(path):
        if path.exists() and not path.is_dir():
            raise OutputError(
                f"{path} is a file; expected a folder to write to.", hint="-o another folder"
            )
        # A stage that a killed run left behind is nobody's work.
        names = (
            [name for name in os.listdir(path) if not name.startswith(STAGE_PREFIX)]
            if path.exists()
            else []
        )
        holds_ours = any(name in names for name in markers)
        if names and not holds_ours:
            raise OutputError(
                f"{path} exists and holds other files ({sorted(names)[0]}, {len(names)} in all); "
                "kvq writes to a new or empty folder and replaces only its own sidecars.",
                hint="-o another folder",
            )
        if names and not overwrite:
            raise OutputError(
                f"{path} already holds a sidecar.",
                hint="--overwrite replaces it, or -o another folder",
            )
        _check_access(path)
    return path


def write_folder(
    directory: str | os.PathLike[str],
    files: Mapping[str, bytes],
    *,
    markers: Collection[str],
    overwrite: bool = False,
) -> Path:
    """Write ``files`` (name to content) so that no reader ever sees a part of them.

    A new folder appears by one rename. In an existing one (empty, or with ``overwrite`` one that
    holds ``markers``) each file is replaced by a rename, and other files stay. The first file must
    be meaningful without the others: at the moment when it is replaced the others are away, so a
    run that is killed leaves the old folder or the new one. Modes follow the umask. Returns the
    absolute path; raises OutputError, and whatever it raises, nothing half-written stays.
    """
    path = check_folder(directory, markers=markers, overwrite=overwrite)
    with explained(path, num_bytes=sum(len(content) for content in files.values())):
        if path.exists():
            _replace(path, files)
        else:
            _create(path, files)
    return path


@contextmanager
def explained(path: Path, *, num_bytes: int | None = None) -> Iterator[None]:
    """Turn the errors of a file system into OutputError."""
    try:
        yield
    except OSError as error:
        where = f"cannot write to {path}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needs = f" (needs {num_bytes / 1e6:.1f} MB)" if num_bytes else ""
            message = f"{where}: the disk is full or a quota is reached{needs}."
            hint = "free some space, or -o a folder on another disk"
        elif error.errno in (errno.EACCES, errno.EPERM):
            message = f"{where}: permission denied."
            hint = "-o a folder that you may write to"
        elif error.errno == errno.EROFS:
            message = f"{where}: the file system is read-only."
            hint = "-o a folder that you may write to"
        else:
            message = f"{where}: {error.strerror or error}."
            hint = "-o another folder"
        raise OutputError(message, hint=hint) from error


def _check_access(path: Path) -> None:
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "permission denied")


def _create(path: Path, files: Mapping[str, bytes]) -> None:
    missing = [parent for parent in path.parents if not parent.exists()]
    stage = path.parent / f"{STAGE_PREFIX}{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_stage(stage, files)
        os.rename(stage, path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in missing:
            # Stays if somebody else has put something there meanwhile.
            with suppress(OSError):
                parent.rmdir()
        raise


def _replace(path: Path, files: Mapping[str, bytes]) -> None:
    stage = path / f"{STAGE_PREFIX}{secrets.token_hex(8)}"
    try:
        _write_stage(stage, files)
        _exchange(path, stage, list(files))
        _sync_directory(path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _exchange(path: Path, stage: Path, names: list[str]) -> None:
    first, *others = names
    old = stage / "old"
    old.mkdir()
    try:
        for name in others:
            if (path / name).exists():
                os.replace(path / name, old / name)
        os.replace(stage / first, path / first)
        for name in others:
            os.replace(stage / name, path / name)
    except BaseException:
        # Interrupted: complete the side on which the first file already is.
        source = old if (stage / first).exists() else stage
        for name in others:
            if (source / name).exists():
                os.replace(source / name, path / name)
        raise


def _write_stage(stage: Path, files: Mapping[str, bytes]) -> None:
    stage.mkdir()
    for name, content in files.items():
        with open(stage / name, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync_directory(stage)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; the files themselves are on the disk.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
