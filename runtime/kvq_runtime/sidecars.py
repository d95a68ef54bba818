"""Find a sidecar by path or by Hub id."""

from __future__ import annotations

import os
from pathlib import Path

from kvq_formats.errors import SidecarError
from kvq_formats.sidecar import Sidecar
from kvq_formats.sidecar_header import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from kvq_runtime.hub import explain_hub_error, is_hub_id, is_offline, is_reachable
from kvq_runtime.quiet import quiet_hub


def find_sidecar(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local path of a sidecar; one on the Hub (``org/name[@revision]``) is downloaded.

    What exists here is taken before what may exist there. Raises SidecarError.
    """
    given = os.fspath(name)
    path = Path(given).expanduser()
    repo_id, _, in_name = given.partition("@")
    if path.exists() or "/" not in repo_id or not is_hub_id(repo_id):
        return path
    import huggingface_hub

    revision = revision or in_name or None
    try:
        with quiet_hub():
            folder = huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[TENSORS_FILE, CONFIG_FILE, CARD_FILE],
                local_files_only=is_offline() or not is_reachable(),
            )
    except (OSError, ValueError) as error:
        explained = explain_hub_error(
            error, repo_id, revision=revision, kind="sidecar", raises=SidecarError
        )
        if explained is None:
            raise
        # A path with one slash looks like an id: the nearer mistake is said first.
        raise SidecarError(
            f"there is no sidecar at {path}; as a Hub id: {explained.message}", hint=explained.hint
        ) from error
    if not (Path(folder) / TENSORS_FILE).is_file():
        raise SidecarError(
            f"{repo_id} is not a sidecar: the repository has no {TENSORS_FILE}.",
            hint=f"kvq calibrate {repo_id} makes one, if that is a model",
        )
    return Path(folder)


def open_sidecar(name: str | os.PathLike[str], *, revision: str | None = None) -> Sidecar:
    """Load a sidecar by path or Hub id; raises SidecarError."""
    return Sidecar.load(find_sidecar(name, revision=revision))
