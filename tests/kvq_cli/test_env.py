from __future__ import annotations

from importlib.metadata import version

import pytest

from command_line import Kvq
from kvq_cli.commands.env import PACKAGES


def test_markdown_by_default(kvq: Kvq) -> None:
    lines = kvq("env").stdout.splitlines()
    assert lines[:2] == ["| what | value |", "|---|---|"]
    assert f"| packages.torch | {version('torch')} |" in lines
    assert all(line.count("|") == 3 for line in lines)


def test_json(kvq: Kvq) -> None:
    found = kvq("env", "--json").json
    assert found["schema"] == "kvq.env/1"
    assert found["kvq"] == {"version": version("kvq"), "sidecar_format": 1}
    assert set(found["packages"]) == set(PACKAGES)
    assert isinstance(found["torch"]["gpus"], list)


def test_no_secret_is_printed(kvq: Kvq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_print_me")
    ran = kvq("env", "--json")
    assert "hf_do_not_print_me" not in ran.stdout + ran.stderr


def test_a_torch_that_cannot_be_imported_is_reported(
    kvq: Kvq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    ran = kvq("env", "--json")
    assert ran.code == 0
    assert "ModuleNotFoundError" in ran.json["torch"]["error"]


def test_a_gpu_is_described(kvq: Kvq, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    properties = SimpleNamespace(name="Test GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert kvq("env", "--json").json["torch"]["gpus"] == [
        {"name": "Test GPU", "capability": "9.0", "memory_bytes": 80 * 2**30}
    ]
    assert "| torch.gpus | Test GPU 9.0 85899345920 |" in kvq("env").stdout
