"""What people are told about a data set of the Hub that cannot be used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub import errors as hub

from kvq_calibration.hub_errors import HubUnreachableError, hub_errors
from kvq_formats.errors import DataError


def http_error(kind: type[Any], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("first line\nsecond line", response=response)


def told(error: Exception, **options: bool) -> Exception:
    with pytest.raises((DataError, HubUnreachableError)) as caught, hub_errors("o/d", **options):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach"),
        TimeoutError("slow"),
        hub.LocalEntryNotFoundError("not in the cache"),
        hub.HTTPError("no route to host"),
        http_error(hub.HfHubHTTPError, 503),
        http_error(hub.HfHubHTTPError, 429),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_out_of_reach(error: Exception) -> None:
    assert isinstance(told(error), HubUnreachableError)
    # In the middle of the text nothing can stand in.
    assert isinstance(told(error, reading=True), DataError)


def test_offline_mode_is_named() -> None:
    assert str(told(hub.OfflineModeIsEnabled("offline"))) == "HF_HUB_OFFLINE is set"


@pytest.mark.parametrize(
    "error",
    [
        http_error(hub.GatedRepoError, 403),
        DatasetNotFoundError("Dataset 'o/d' is a gated dataset on the Hub."),
    ],
)
def test_gated(error: Exception) -> None:
    answer = told(error)
    assert isinstance(answer, DataError)
    assert "is gated" in answer.message
    assert "https://huggingface.co/datasets/o/d" in str(answer.hint)
    assert "hf auth login" in str(answer.hint)


@pytest.mark.parametrize(
    "error",
    [
        http_error(hub.RepositoryNotFoundError, 401),
        DatasetNotFoundError("Dataset 'o/d' doesn't exist on the Hub or cannot be accessed."),
    ],
)
def test_not_there(error: Exception) -> None:
    answer = told(error)
    assert isinstance(answer, DataError)
    assert "there is no data set o/d" in answer.message


def test_configuration() -> None:
    answer = told(ValueError("Config name is missing.\nPick one among: ['a', 'b']\nExample"))
    assert isinstance(answer, DataError)
    assert "Pick one among: ['a', 'b']" in answer.message
    assert answer.hint == "name it: o/d:CONFIG"


@pytest.mark.parametrize(
    "error",
    [
        DataFilesNotFoundError("No (supported) data files found"),
        RuntimeError("Dataset scripts are no longer supported"),
        http_error(hub.HfHubHTTPError, 403),
        ValueError("bad JSON"),
    ],
)
def test_anything_else_is_told_with_its_words(error: Exception) -> None:
    answer = told(error)
    assert isinstance(answer, DataError)
    assert "o/d cannot be read" in answer.message
    assert str(error).splitlines()[0] in answer.message


def test_a_programming_error_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), hub_errors("o/d"):
        raise TypeError("ours")
