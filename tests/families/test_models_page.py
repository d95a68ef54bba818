"""``docs/models.md`` says what is tried and tested now."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_model_docs", ROOT / "scripts" / "generate_model_docs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pinned() -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("transformers==")]
    return line.partition("==")[2]


# Other versions refuse some models for another reason; the page gives that of the pinned one.
@pytest.mark.skipif(version("transformers") != pinned(), reason="the page is of another version")
def test_the_page_is_not_stale() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert generator().page(text) == text, "docs/models.md is stale: make docs"
