"""Help is part of the interface: its text is kept, and it has the parts that it should have."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from syrupy.assertion import SnapshotAssertion
from typer.testing import CliRunner

from kvq_cli.app import app

COMMANDS = ("calibrate", "inspect", "eval", "generate", "demo", "doctor", "env")
ROOT = Path(__file__).parents[2]
TO_COME = ("resume", "kvq chat", "kvq bench", "kvq report",
           "kvq serve", "kvq push", "kvq convert")  # fmt: skip


def help_of(*arguments: str) -> str:
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": None, "NO_COLOR": "1"})
    result = runner.invoke(app, [*arguments, "--help"], prog_name="kvq")
    assert result.exit_code == 0
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command: str | None, snapshot: SnapshotAssertion) -> None:
    assert help_of(*([command] if command else [])) == snapshot


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_globals_and_where_to_go_on(command: str) -> None:
    text = help_of(command)
    assert re.search(rf"Examples\n\s+kvq {command}\b", text)
    for flag in ("--json", "--quiet", "--verbose", "--no-progress"):
        assert flag in text
    last = text.strip().splitlines()[-1]
    assert "docs/" in last
    assert "kvq " in last


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_promises_nothing_that_does_not_exist(command: str | None) -> None:
    text = help_of(*([command] if command else []))
    assert [word for word in TO_COME if word in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documentation_page_that_help_names_exists(command: str) -> None:
    for page in re.findall(r"docs/[\w-]+\.md", help_of(command)):
        assert (ROOT / page).is_file()


def generator() -> ModuleType:
    path = ROOT / "scripts" / "generate_cli_docs.py"
    spec = importlib.util.spec_from_file_location("generate_cli_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_not_stale() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generator().page(), (
        "docs/cli.md is stale: make docs"
    )


def test_the_page_names_every_option_and_its_variable() -> None:
    page = generator().page()
    for command in COMMANDS:
        for flag in set(re.findall(r"│ (--[a-z][\w-]+)", help_of(command))) - {"--help"}:
            assert f"`{flag}`" in page
    assert "| `KVQ_OUTLIER_FRACTION` | `--outlier-fraction` |" in page


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
