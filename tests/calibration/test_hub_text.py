"""Text of the Hub, with ``datasets`` and the Hub's answers put in place of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from kvq_calibration.hub_errors import HubUnreachableError
from kvq_calibration.hub_text import HubDataset, hub_text
from kvq_formats.errors import DataError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Let the Hub hold ``splits``; returns the calls of ``load_dataset``."""

    def start(
        splits: dict[str, Any],
        *,
        info_error: Exception | None = None,
        load_error: Exception | None = None,
        cached: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def dataset_info(_api: object, _repo: str, **_options: object) -> SimpleNamespace:
            if info_error is not None:
                raise info_error
            return SimpleNamespace(sha=SHA)

        def load_dataset(repo: str, **options: Any) -> dict[str, Any]:
            calls.append({"repo": repo, **options})
            if not options.get("streaming"):
                assert datasets.config.HF_HUB_OFFLINE
                assert huggingface_hub.constants.HF_HUB_OFFLINE
                if cached is None:
                    raise ConnectionError("not cached")
                return cached
            if load_error is not None:
                raise load_error
            return splits

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return start


def rows(*texts: str | None) -> list[dict[str, Any]]:
    return [{"id": i, "text": text} for i, text in enumerate(texts)]


class Stream:
    """Rows that count how many were taken, and fail at ``fail_at``."""

    def __init__(self, length: int, fail_at: int | None = None) -> None:
        self.length, self.fail_at, self.taken = length, fail_at, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.length):
            if number == self.fail_at:
                raise ConnectionError("gone")
            self.taken += 1
            yield {"text": f"row {number}"}


def test_split_by_purpose_pinned_to_the_commit(serve: Any) -> None:
    calls = serve({"train": rows("a", "", "b"), "validation": rows("v"), "test": rows("t")})
    source = hub_text(HubDataset(repo="o/d", name="o/d:c", config="c", purpose="calibrate"))
    # Empty rows count: the field joins them too.
    assert list(source.texts) == ["a", "", "b"]
    assert (source.name, source.revision, source.streamed) == ("o/d:c", SHA, True)
    assert calls == [{"repo": "o/d", "name": "c", "revision": SHA, "streaming": True}]
    assert list(hub_text(HubDataset(repo="o/d", name="o/d", purpose="eval")).texts) == ["t"]


def test_evaluation_falls_back_to_validation_but_never_to_train(serve: Any) -> None:
    wanted = HubDataset(repo="o/d", name="o/d", purpose="eval")
    serve({"train": rows("a"), "validation": rows("v")})
    assert list(hub_text(wanted).texts) == ["v"]
    serve({"train": rows("a")})
    with pytest.raises(DataError, match="no split named test or validation; its splits: train"):
        hub_text(wanted)


def test_split_asked_for(serve: Any) -> None:
    serve({"train": rows("a"), "test": rows("t")})
    wanted = HubDataset(repo="o/d", name="o/d", purpose="calibrate", split="test")
    source = hub_text(wanted)
    assert list(source.texts) == ["t"]
    assert source.notes == ("calibrating on split 'test' of o/d: do not evaluate on that split",)
    with pytest.raises(DataError, match="no split named x; its splits: train, test"):
        hub_text(HubDataset(repo="o/d", name="o/d", purpose="eval", split="x"))


def test_text_column(serve: Any) -> None:
    serve({"train": [{"question": "q", "answer": "a", "n": 1}]})
    with pytest.raises(DataError, match="question, answer, n") as caught:
        hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))
    assert caught.value.hint == "--text-column question"
    wanted = HubDataset(repo="o/d", name="o/d", purpose="calibrate", text_column="answer")
    assert list(hub_text(wanted).texts) == ["a"]


def test_only_what_is_used_is_read(serve: Any) -> None:
    stream = Stream(10**9)
    serve({"train": stream})
    source = hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))
    assert stream.taken == 1
    texts = iter(source.texts)
    assert [next(texts) for _ in range(100)] == [f"row {i}" for i in range(100)]
    assert stream.taken < 300


def test_number_of_texts_is_limited(serve: Any) -> None:
    serve({"validation": Stream(10**9)})
    wanted = HubDataset(repo="o/d", name="o/d", purpose="eval", max_texts=70)
    assert len(list(hub_text(wanted).texts)) == 70


def test_split_without_rows(serve: Any) -> None:
    serve({"train": []})
    with pytest.raises(DataError, match="has no rows"):
        hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))


def test_copy_in_the_cache_is_used_offline(serve: Any) -> None:
    serve({}, info_error=ConnectionError("no route"), cached={"train": rows("cached")})
    source = hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))
    assert list(source.texts) == ["cached"]
    assert source.revision is None
    assert source.notes[0].startswith("offline (the Hugging Face Hub cannot be reached): the copy")
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_unreachable_without_a_copy(serve: Any) -> None:
    calls = serve({}, info_error=ConnectionError("no route"))
    with pytest.raises(HubUnreachableError, match="cannot be reached"):
        hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))
    # No streamed attempt: that one would retry for half a minute.
    assert [call.get("streaming") for call in calls] == [None]


def test_blocked_download_server_is_met_at_once(serve: Any) -> None:
    serve({"train": Stream(10, fail_at=0)})
    with pytest.raises(HubUnreachableError):
        hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))


def test_connection_lost_in_the_middle(serve: Any) -> None:
    serve({"train": Stream(500, fail_at=200)})
    source = hub_text(HubDataset(repo="o/d", name="o/d", purpose="calibrate"))
    with pytest.raises(DataError, match="connection was lost while o/d was read"):
        list(source.texts)
