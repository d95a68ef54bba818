from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch

from kvq_evaluation.sidecars import evaluate_on_tokens, row_names
from kvq_formats.errors import ConfigError, DataError
from tiny_models import make_tiny_llama

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


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 8), r"float32 \[2, 8\], expected int64 \[S, T\]"),
        (torch.zeros(2, 8, dtype=torch.int32), "int32"),
        (torch.zeros(8, dtype=torch.int64), r"int64 \[8\]"),
        ([[1, 2, 3]], "tokens is list"),
    ],
)
def test_tokens_that_are_no_windows_of_ids(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        evaluate_on_tokens(make_tiny_llama(), ["q"], tokens=tokens)
    assert "input_ids" in (caught.value.hint or "")


def test_without_a_sidecar_there_is_nothing_to_compare() -> None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match="no sidecar is given") as caught:
        evaluate_on_tokens(make_tiny_llama(), [], tokens=tokens)
    assert "kvq.calibrate" in (caught.value.hint or "")
