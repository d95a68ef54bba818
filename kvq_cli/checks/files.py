"""Weights and tokenizer: there, whole, or what would have to be downloaded; and room for both."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_cli.checks.check import Check
from kvq_cli.sizes import show_bytes
from kvq_formats.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from kvq_cli.checks.found_model import FoundModel
    from kvq_formats.sidecar import Sidecar

WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
HUB_SECONDS = 10.0
"""How long the Hub may take to tell sizes."""


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold the weights.

    Fields:
        usable: whether a command could load them, after a download maybe.
        missing: whether some of them have to be downloaded.
        download_bytes: how much; None where it is not known.
    """

    usable: bool
    missing: bool = False
    download_bytes: int | None = None


def check_weight_files(found: FoundModel) -> tuple[Check, WeightFiles]:
    """All files of the weights are there and their headers can be read; nothing else is read."""
    from kvq_runtime.model_files import check_files, check_weights, weight_files

    name, folder = "weights", found.folder
    if found.error is not None and not isinstance(found.error, UnsupportedModelError):
        return Check.failure(name, found.error), WeightFiles(usable=False)
    try:
        if found.is_local and folder is not None:
            check_files(os.listdir(folder), name=str(folder), is_local=True)
        files = weight_files(folder) if folder is not None and _has_weights(folder) else []
        there = [file for file in files if file.is_file()]
        if found.is_local or (files and len(there) == len(files)):
            assert folder is not None
            check_weights(folder)
    except ModelError as error:
        if not found.is_local:
            error.hint = f"hf download {found.location} --force-download"
        return Check.failure(name, error), WeightFiles(usable=False)
    if files and len(there) == len(files):
        size = show_bytes(sum(file.stat().st_size for file in there))
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        where = "" if found.is_local else " in the cache"
        return Check(name, "pass", f"{count}{where}, {size}, headers are readable"), WeightFiles(
            True
        )
    return _to_download(found, {file.name for file in there}, expected=len(files))


def check_tokenizer(found: FoundModel) -> Check:
    """A tokenizer can be read, or is among the files on the Hub."""
    from kvq_runtime.hub import repository_files
    from kvq_runtime.model_files import has_tokenizer
    from kvq_runtime.models import load_tokenizer

    name, folder = "tokenizer", found.folder
    is_here = folder is not None and has_tokenizer(os.listdir(folder))
    if not found.is_local and not is_here:
        names = repository_files(found.location, revision=found.revision)
        if names and not has_tokenizer(names):
            return Check(name, "fail", f"{found.name} has no tokenizer.", "MODEL with one")
        return Check(name, "note", "not in the cache; it is downloaded with the weights")
    if found.resolved is None:
        return (
            Check(name, "pass", "its files are there")
            if is_here
            else Check(name, "fail", f"{found.name} has no tokenizer.", "MODEL with one")
        )
    try:
        tokenizer = load_tokenizer(replace(found.resolved, local_files_only=True))
    except ModelError as error:
        return Check.failure(name, error)
    return Check(name, "pass", f"{type(tokenizer).__name__}, {len(tokenizer):,} entries")


def check_download(found: FoundModel, weights: WeightFiles) -> Check | None:
    """What has to be downloaded fits into Hugging Face's cache; None if that is nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not weights.missing:
        return None
    free = free_bytes(Path(HF_HUB_CACHE))
    if weights.download_bytes is None:
        message = f"{show_bytes(free)} are free in {HF_HUB_CACHE}; the size of {found.name} is not"
        return Check("download", "note", f"{message} known without asking the Hub")
    message = f"{show_bytes(weights.download_bytes)} of weights, {show_bytes(free)} free in"
    if weights.download_bytes > free:
        return Check(
            "download",
            "fail",
            f"{message} {HF_HUB_CACHE}.",
            "free some space (hf cache rm), or set HF_HOME to a folder on another disk",
        )
    return Check("download", "pass", f"{message} {HF_HUB_CACHE}")


def check_sidecar_disk(sidecar: Sidecar, folder: Path) -> tuple[Check, int]:
    """The sidecar fits where ``kvq calibrate`` writes it without ``-o``; its bytes."""
    size = _saved_bytes(sidecar)
    free = free_bytes(folder)
    message = f"a sidecar of {show_bytes(size)}, {show_bytes(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} cannot be written.", "-o another folder"), size
    if size > free:
        return Check("disk", "fail", f"{message}.", "free some space, or -o another disk"), size
    return Check("disk", "pass", message), size


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds ``folder``, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _to_download(found: FoundModel, there: set[str], *, expected: int) -> tuple[Check, WeightFiles]:
    from kvq_runtime.hub import is_offline, not_cached

    if is_offline() or (found.resolved is not None and found.resolved.local_files_only):
        error = not_cached(
            found.location, subject=f"all weights of {found.location}", raises=ModelError
        )
        return Check.failure("weights", error), WeightFiles(usable=False)
    size = _download_bytes(found.location, found.revision, there)
    some = f"{len(there)} of {expected} files are in the cache" if there else "not in the cache"
    much = "" if size is None else f" ({show_bytes(size)})"
    check = Check("weights", "note", f"{some}; the rest is downloaded when it is first used{much}")
    return check, WeightFiles(usable=True, missing=True, download_bytes=size)


def _has_weights(folder: Path) -> bool:
    from kvq_runtime.model_files import is_complete

    return is_complete(os.listdir(folder))


def _download_bytes(location: str, revision: str | None, there: set[str]) -> int | None:
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            location, revision=revision, files_metadata=True, timeout=HUB_SECONDS
        )
    # Whatever the network raises: a size is good to know, and nothing depends on it.
    except Exception:
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = [name for name in sizes if WEIGHT_FILE.fullmatch(name) and name not in there]
    return sum(sizes[name] for name in wanted) or None


def _saved_bytes(sidecar: Sidecar) -> int:
    """Bytes of the files of a sidecar, as it is saved."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        saved = sidecar.save(Path(folder) / "sidecar")
        return sum(file.stat().st_size for file in saved.iterdir())
