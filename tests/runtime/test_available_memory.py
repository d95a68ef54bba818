"""How much memory is free, in containers too."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from kvq_runtime import available_memory
from kvq_runtime.available_memory import available_bytes, host_available_bytes

GIB = 2**30


def group(folder: Path, *, limit: str, used: int, files: int | None = 0) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    counts = "anon 17\n" if files is None else f"anon 17\ninactive_file {files}\nslab 3\n"
    (folder / "memory.stat").write_text(counts)
    return folder


@pytest.mark.parametrize(
    ("limit", "used", "files", "expected"),
    [
        (str(4 * GIB), GIB, 0, 3 * GIB),
        # Pages of files are given up on demand.
        (str(4 * GIB), 2 * GIB, GIB, 3 * GIB),
        (str(4 * GIB), GIB, None, 3 * GIB),
        ("max", GIB, 0, 8 * GIB),
        # A limit above what the machine has is none, one below what is used leaves nothing.
        (str(64 * GIB), GIB, 0, 8 * GIB),
        (str(GIB), 2 * GIB, 0, 0),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    used: int,
    files: int | None,
    expected: int,
) -> None:
    monkeypatch.setattr(
        available_memory, "CONTROL_GROUP", group(tmp_path, limit=limit, used=used, files=files)
    )
    free = psutil.virtual_memory()._replace(available=8 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert host_available_bytes() == available_bytes("cpu") == expected


def test_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available_memory, "CONTROL_GROUP", tmp_path / "none")
    assert 0 < host_available_bytes() <= psutil.virtual_memory().total


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds in reserve is free for us; weights that are spread may use the host too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((index or 0) * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: GIB)
    monkeypatch.setattr(available_memory, "host_available_bytes", lambda: 100 * GIB)
    assert available_bytes("cuda:1") == 3 * GIB
    assert available_bytes("cuda") == 2 * GIB
    assert available_bytes("auto") == (2 + 3 + 100) * GIB
