from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from kvq_evaluation.sidecars import row_names

if TYPE_CHECKING:
    from kvq_formats.sidecar import Sidecar


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/q3", Path("b/q4")], ["q3", "q4"]),
        (["a/q", "b/q"], ["a/q", "b/q"]),
        (["a/q", "a/q"], ["a/q (1)", "a/q (2)"]),
        (["q3/"], ["q3"]),
    ],
)
def test_row_names_are_short_and_different(given: list[str | Path], names: list[str]) -> None:
    assert row_names(cast("list[str | Sidecar]", given)) == names


def test_a_file_and_the_current_folder_are_named_by_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q3").mkdir()
    (tmp_path / "q3" / "kvq.safetensors").write_bytes(b"")
    assert row_names([tmp_path / "q3" / "kvq.safetensors"]) == ["q3"]
    monkeypatch.chdir(tmp_path / "q3")
    assert row_names(["."]) == ["q3"]
