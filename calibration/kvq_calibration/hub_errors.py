"""What the Hugging Face libraries raise, told to people; and whether the Hub answered at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvq_formats.errors import DataError


class HubUnreachableError(Exception):
    """The Hub did not answer: bundled text may stand in. Not for people; callers translate it."""


@contextmanager
def hub_errors(repo: str, *, reading: bool = False) -> Iterator[None]:
    """Turn what ``datasets`` and ``huggingface_hub`` raise into ours.

    ``reading``: in the middle of the text nothing can stand in any more, so that a lost connection
    is a ``DataError`` too.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError, DatasetsError) as error:
        translated = _translate(error, repo)
        if reading and isinstance(translated, HubUnreachableError):
            translated = DataError(
                f"the connection was lost while {repo} was read: {translated}",
                hint="try again, or use the text named builtin, which needs no network",
            )
        raise translated from error


def _translate(error: Exception, repo: str) -> Exception:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    first_lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
    page = f"https://huggingface.co/datasets/{repo}"
    if isinstance(error, GatedRepoError) or (
        isinstance(error, DatasetNotFoundError) and "gated" in str(error)
    ):
        return DataError(
            f"the data set {repo} is gated: its terms must be accepted first",
            hint=f"accept them at {page}, then run: hf auth login",
        )
    if isinstance(error, (RepositoryNotFoundError, DatasetNotFoundError)):
        return DataError(
            f"there is no data set {repo} on the Hugging Face Hub that you may read, "
            "nor a file of that name",
            hint="check the spelling; for a private data set run: hf auth login",
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status is None or status >= 500 or status in (408, 429):
            return HubUnreachableError(f"the Hugging Face Hub answered {status}")
        return DataError(f"the data set {repo} cannot be read: {first_lines}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError("HF_HUB_OFFLINE is set")
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return HubUnreachableError("the Hugging Face Hub cannot be reached")
    if isinstance(error, ValueError) and "config" in str(error).lower():
        return DataError(
            f"the configuration of the data set {repo} is not clear: {first_lines}",
            hint=f"name it: {repo}:CONFIG",
        )
    return DataError(
        f"the data set {repo} cannot be read: {type(error).__name__}: {first_lines}", hint=page
    )
