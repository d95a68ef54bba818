"""Which text a name means, with and without network, for calibration and for evaluation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvq_calibration import data
from kvq_calibration.bundled import bundled_text
from kvq_calibration.data import Purpose, load_text
from kvq_calibration.hub_errors import HubUnreachableError
from kvq_calibration.hub_text import HubDataset
from kvq_calibration.text_source import TextSource
from kvq_formats.errors import ConfigError, DataError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[HubDataset]:
    """What the Hub was asked for."""
    wanted: list[HubDataset] = []

    def hub_text(dataset: HubDataset) -> TextSource:
        wanted.append(dataset)
        return TextSource(dataset.name, "sha", ["text"], dataset.purpose)

    monkeypatch.setattr(data, "hub_text", hub_text)
    return wanted


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub_text(_dataset: HubDataset) -> TextSource:
        raise HubUnreachableError("the Hugging Face Hub cannot be reached")

    monkeypatch.setattr(data, "hub_text", hub_text)


def joined(source: TextSource) -> str:
    return source.separator.join(source.texts)


def test_builtin() -> None:
    source = load_text("builtin", purpose="calibrate")
    parts = [bundled_text("calibration", name) for name in ("wikipedia", "c4")]
    assert joined(source) == "\n\n".join(parts)
    assert joined(load_text("builtin", purpose="eval")) == bundled_text("test", "wikitext2")
    with pytest.raises(DataError, match="kept for evaluation"):
        load_text("builtin:dev", purpose="calibrate")


@pytest.mark.parametrize(
    ("dataset", "purpose", "expected"),
    [
        ("wikitext2", "calibrate", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "\n\n")),
        ("wikitext2", "eval", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "\n\n")),
        ("c4", "calibrate", ("allenai/c4", "en", "train", "\n\n")),
        ("c4", "eval", ("allenai/c4", "en", "validation", " ")),
        ("org/name", "eval", ("org/name", None, None, "\n\n")),
        ("org/na.me:con-fig", "eval", ("org/na.me", "con-fig", None, "\n\n")),
        ("imdb", "calibrate", ("imdb", None, None, "\n\n")),
    ],
)
def test_names_of_the_hub(
    asked: list[HubDataset], dataset: str, purpose: Purpose, expected: tuple[Any, ...]
) -> None:
    load_text(dataset, purpose=purpose)
    wanted = asked[0]
    assert (wanted.repo, wanted.config, wanted.split, wanted.separator) == expected
    assert (wanted.name, wanted.purpose) == (dataset, purpose)
    assert wanted.max_texts == (1100 if (dataset, purpose) == ("c4", "eval") else None)


def test_split_and_column_reach_the_hub(asked: list[HubDataset]) -> None:
    load_text("wikitext2", purpose="eval", split="validation", text_column="line")
    assert (asked[0].split, asked[0].text_column) == ("validation", "line")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("dataset", "purpose", "folder", "name"),
    [
        ("wikitext2", "calibrate", "calibration", "wikipedia"),
        ("c4", "calibrate", "calibration", "c4"),
        ("wikitext2", "eval", "test", "wikitext2"),
        ("c4", "eval", "test", "c4"),
    ],
)
def test_bundled_text_stands_in_offline(
    dataset: str, purpose: Purpose, folder: str, name: str
) -> None:
    source = load_text(dataset, purpose=purpose)
    assert joined(source) == bundled_text(folder, name)
    assert source.name == f"{dataset} (bundled {folder}/{name})"
    assert source.notes == (
        "offline (the Hugging Face Hub cannot be reached): "
        f"bundled text {folder}/{name} stands in for {dataset}",
    )


@pytest.mark.usefixtures("offline")
def test_options_without_effect_offline_are_named() -> None:
    source = load_text("wikitext2", purpose="eval", split="train")
    assert source.notes[1] == "--split train: no effect on bundled text"


@pytest.mark.usefixtures("offline")
def test_other_data_sets_need_the_network() -> None:
    with pytest.raises(DataError, match=r"not a local file.*out of reach") as caught:
        load_text("org/name", purpose="calibrate")
    assert caught.value.hint == "--dataset builtin works offline"
    with pytest.raises(DataError) as caught:
        load_text("wikitext-2", purpose="eval")
    assert caught.value.hint == "did you mean wikitext2?"


def test_local_files_are_not_looked_for_on_the_hub(
    asked: list[HubDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("local text")
    for name in ("folder/a.txt", "./folder/a.txt", str(tmp_path / "folder" / "a.txt")):
        assert joined(load_text(name, purpose="eval")) == "local text"
    for name in ("folder", "missing.txt", "some/missing.jsonl", "~/missing/x", "table.csv", "a b"):
        with pytest.raises(DataError):
            load_text(name, purpose="eval")
    assert asked == []


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="--split train means nothing for builtin"):
        load_text("builtin", purpose="eval", split="train")
    with pytest.raises(ConfigError, match="--text-column x means nothing for builtin"):
        load_text("builtin", purpose="eval", text_column="x")
    with pytest.raises(ConfigError, match=r"--split test means nothing for \./a\.txt"):
        load_text("./a.txt", purpose="eval", split="test")


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, kvq_calibration.data;"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_a_machine_without_network_learns_it_without_retries(tmp_path: Path) -> None:
    # A closed port stands for no network; each retry of the library would write a line.
    code = (
        "from kvq_calibration.data import load_text;"
        "print(load_text('wikitext2', purpose='calibrate').notes[0])"
    )
    environment = {
        "PATH": "",
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.startswith("offline (the Hugging Face Hub cannot be reached)")
    assert result.stderr == ""
