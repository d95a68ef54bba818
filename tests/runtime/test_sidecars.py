from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from kvq_formats.errors import SidecarError
from kvq_runtime import sidecars


def test_what_exists_here_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "sidecar").mkdir(parents=True)
    assert sidecars.find_sidecar("org/sidecar") == Path("org/sidecar")
    # Names that no repository has are left to Sidecar.load, which says that there is nothing.
    assert sidecars.find_sidecar("./nowhere") == Path("./nowhere")
    assert sidecars.find_sidecar("nowhere") == Path("nowhere")
    with pytest.raises(SidecarError, match="no sidecar at"):
        sidecars.open_sidecar("nowhere")


def test_a_repository_is_downloaded_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        (tmp_path / "kvq.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(sidecars, "is_reachable", lambda: True)
    monkeypatch.setattr(sidecars, "is_offline", lambda: False)
    assert sidecars.find_sidecar("org/sidecar@v2") == tmp_path
    assert (asked["repo_id"], asked["revision"]) == ("org/sidecar", "v2")
    assert asked["local_files_only"] is False
    assert set(asked["allow_patterns"]) == {"kvq.safetensors", "kvq_config.json", "README.md"}


def test_without_network_it_is_a_sidecar_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(sidecars, "is_reachable", lambda: False)
    expected = "no sidecar at org/sidecar; as a Hub id: the local cache does not hold"
    with pytest.raises(SidecarError, match=expected) as caught:
        sidecars.find_sidecar("org/sidecar")
    assert "hf download org/sidecar" in (caught.value.hint or "")
