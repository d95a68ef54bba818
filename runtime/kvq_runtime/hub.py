"""The Hugging Face Hub: which names are ids, whether it can be reached, what its errors mean."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from kvq_formats.errors import KVQError

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB = "https://huggingface.co"


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be a repository: ``org/name``, or ``name`` as the oldest ones."""
    return HUB_ID.fullmatch(name) is not None


def is_offline() -> bool:
    """Whether the user has asked for no network (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_reachable() -> bool:
    """False if the Hub's address cannot even be looked up.

    The Hub's client repeats failing requests for half a minute; where there is no network at all
    this answers at once. Behind a proxy nothing can be told, and the answer is True.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if getproxies().keys() & {address.scheme, "all"}:
        return True
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


def explain_hub_error(
    error: BaseException,
    repo_id: str,
    *,
    revision: str | None = None,
    kind: str = "model",
    raises: type[KVQError] = KVQError,
) -> KVQError | None:
    """Put a failure of the Hub into a sentence; None if ``error`` is of another kind.

    transformers wraps the Hub's errors in OSError, so the whole chain of causes is looked at.
    ``kind`` says what was looked for, ``raises`` is the class of the answer.
    """
    from huggingface_hub import errors

    chain = list(_causes(error))

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(link, types) for link in chain)

    # A gated repository is a repository "not found" for those who may not see it: asked first.
    if caused_by(errors.GatedRepoError):
        return raises(
            f"{repo_id} is gated: its owner asks you to accept a licence at {HUB}/{repo_id}.",
            hint="accept it there, then: hf auth login",
        )
    if caused_by(errors.RevisionNotFoundError):
        return raises(
            f"{repo_id} has no revision {revision!r}.",
            hint=f"see {HUB}/{repo_id}/tree/main, or leave --revision out",
        )
    if caused_by(errors.RepositoryNotFoundError):
        return raises(
            f"there is no {kind} {repo_id}: neither a folder here nor a public repository on the "
            "Hugging Face Hub.",
            hint=f"check the name at {HUB}, give a folder, or for a private one: hf auth login",
        )
    if caused_by(errors.HFValidationError):
        return raises(
            f"{repo_id!r} is neither a folder nor a Hub id.",
            hint=f"{kind.upper()} is org/name, org/name@revision or a folder",
        )
    for link in chain:
        # A file that the repository lacks is no failure of the Hub.
        if isinstance(link, errors.HfHubHTTPError) and not isinstance(
            link, errors.EntryNotFoundError
        ):
            status = link.response.status_code
            return raises(
                f"the Hugging Face Hub answers for {repo_id} with HTTP {status}.",
                hint="try again later; see https://status.huggingface.co",
            )
    unreachable = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    if caused_by(*unreachable) or any(
        type(link).__module__.split(".")[0].startswith("http") for link in chain
    ):
        return not_cached(repo_id, subject=repo_id, raises=raises)
    return None


def not_cached(repo_id: str, *, subject: str, raises: type[KVQError]) -> KVQError:
    """The error for what the cache lacks and the Hub cannot give; ``subject`` says what that is."""
    fetch = f"`hf download {repo_id}` where there is a network, or name a folder"
    known = ", ".join(cached_repositories()[:5])
    cached = f"; cached here: {known}" if known else ""
    if is_offline():
        return raises(
            f"the local cache does not hold {subject}, and HF_HUB_OFFLINE forbids to download it.",
            hint=f"unset HF_HUB_OFFLINE, or {fetch}{cached}",
        )
    return raises(
        f"the local cache does not hold {subject}, and the Hugging Face Hub cannot be reached.",
        hint=f"check the network and its proxy, or {fetch}{cached}",
    )


def cached_repositories() -> list[str]:
    """Ids of the models in the local cache, sorted; empty if there is no cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    return sorted(
        repository.repo_id for repository in repositories if repository.repo_type == "model"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def cached_commit(repo_id: str, revision: str | None, *, file: str = "config.json") -> str | None:
    """The commit sha of a revision, as the cache recorded it when ``file`` was downloaded."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repo_id, file, revision=revision)
    # Snapshots lie in folders that are named after their commit.
    name = Path(path).parent.name if isinstance(path, str) else ""
    return name if COMMIT.fullmatch(name) else None


def cached_files(repo_id: str, *, revision: str | None) -> frozenset[str]:
    """Names of the files of a repository that the cache holds at a revision."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return frozenset(os.listdir(Path(path).parent)) if isinstance(path, str) else frozenset()


def repository_files(repo_id: str, *, revision: str | None) -> frozenset[str]:
    """Names of a repository's files, as the Hub lists them; empty if it does not."""
    import huggingface_hub

    try:
        return frozenset(huggingface_hub.list_repo_files(repo_id, revision=revision))
    except OSError:
        return frozenset()
