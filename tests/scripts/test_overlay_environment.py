"""Environments over another one: the oldest and the newest transformers."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = REPOSITORY / "scripts" / "overlay_environment.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bound_is_read_from_the_project(script: ModuleType) -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    bound = script.lower_bound(text)
    assert f'"transformers>={bound}"' in text
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    (line,) = [line for line in pinned.splitlines() if line.startswith("transformers==")]
    assert bound <= Version(line.partition("==")[2])


@pytest.mark.parametrize(
    ("requirement", "bound"),
    [("transformers>=5.3,!=5.4", "5.3"), ("transformers[x]<6,>=5.3.1", "5.3.1")],
)
def test_bounds(script: ModuleType, requirement: str, bound: str) -> None:
    text = f'[project]\ndependencies = ["torch>=2", "{requirement}"]'
    assert script.lower_bound(text) == Version(bound)


def test_no_lower_bound_is_an_error(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="expected one lower bound"):
        script.lower_bound('[project]\ndependencies = ["transformers<6"]')


def test_its_own_packages_come_before_those_below(script: ModuleType, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    for name in ("both", "lower"):
        (below / f"{name}.py").write_text("where = 'below'\n")
    # Editable packages of the environment below are found through files like this one.
    (below / "editable.pth").write_text(f"{tmp_path / 'source'}\n")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "edited.py").write_text("where = 'source'\n")
    directory = tmp_path / "over"
    (directory / "stale").mkdir(parents=True)
    python, packages = script.make_overlay(directory, below=below)
    assert not (directory / "stale").exists()
    (packages / "both.py").write_text("where = 'over'\n")
    code = "import both, lower, edited; print(both.where, lower.where, edited.where)"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["over", "below", "source"]
    # This environment's, which nothing was said of, is out of sight.
    here = sysconfig.get_path("purelib")
    listed = [python, "-c", f"import sys; print({here!r} in sys.path)"]
    ran = subprocess.run(listed, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
