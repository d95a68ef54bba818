from __future__ import annotations

from pathlib import Path

import pytest

from command_line import Kvq
from kvq_cli.commands import demo
from kvq_cli.output import Output
from kvq_cli.session import recall, remember
from kvq_formats.sidecar import Sidecar


@pytest.fixture(autouse=True)
def a_smaller_subset(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NUM_SAMPLES", 2)
    monkeypatch.setattr(demo, "SEQ_LEN", 64)
    monkeypatch.setattr(demo, "WINDOWS", 2)


def test_demo_ends_with_tables_and_leaves_nothing(
    kvq: Kvq, tmp_path: Path, sidecar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    remember(sidecar, Output())
    ran = kvq("demo")
    assert ran.code == 0
    assert "kvq/tiny-llama" in ran.stdout
    assert "partial: 2 windows" in ran.stdout
    assert ran.stdout.count("unquantized") == 2
    assert ran.stderr.splitlines()[-1].startswith("Next: kvq calibrate ")
    assert list(tmp_path.iterdir()) == []
    # The user's own sidecar stays the current one.
    assert recall() == sidecar


def test_demo_keeps_its_sidecar_if_asked(kvq: Kvq, tmp_path: Path) -> None:
    ran = kvq("demo", "--bits", 2, "-o", tmp_path / "q", "--json")
    assert ran.code == 0
    assert ran.json["schema"] == "kvq.demo/1"
    assert ran.json["calibration"]["config"]["key_bits"] == 2
    assert [len(text["rows"]) for text in ran.json["texts"]] == [2, 2]
    assert Sidecar.load(tmp_path / "q").base_model.id == "kvq/tiny-llama"
    assert recall() is None
    assert kvq("demo", "-o", tmp_path / "q", "--json").code == 1
