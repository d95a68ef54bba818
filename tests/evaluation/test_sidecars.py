from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch

from kvq_evaluation.sidecars import evaluate_on_tokens, row_names
from kvq_formats.errors import ConfigError, DataError
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

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


def test_baselines_by_name_on_both_paths() -> None:
    model, tokens = make_tiny_llama(), torch.arange(60).reshape(3, 20) % 300
    paths = ("prefill", "decode")
    rows = evaluate_on_tokens(
        model, [make_sidecar(4)], tokens=tokens, baselines=["kivi2-g64,int4"], path=paths
    )
    names = ("sidecar 1", "kivi2-g64", "int4")
    expected = [("unquantized", "prefill"), *((name, path) for path in paths for name in names)]
    assert [(row.name, row.path) for row in rows] == expected
    alone = evaluate_on_tokens(model, tokens=tokens, baselines="int4")
    assert alone == [rows[0], rows[3]]


def test_baselines_keep_what_the_first_sidecar_keeps(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = make_sidecar(4, sink_tokens=2, recent_tokens=3), make_sidecar(4)
    text = first.calibration.model_copy(update={"dataset": "./nowhere.txt"})
    rows = evaluate_on_tokens(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        [replace(first, calibration=text), second],
        tokens=torch.arange(60).reshape(3, 20),
        baselines=["fp8"],
        tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    # 5 of 20 tokens at 16 bits, the others at 8.
    assert rows[-1].effective_bits == 10
    assert "calibrated on builtin: ./nowhere.txt cannot be read" in caplog.text
    assert "sidecar 2 keeps other tokens exact" in caplog.text


def test_a_calibrated_baseline_needs_a_tokenizer() -> None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"no tokenizer is given, .*: fp8 must be") as caught:
        evaluate_on_tokens(make_tiny_llama(), tokens=tokens, baselines=["fp8", "int4"])
    assert "tokenizer=tokenizer" in (caught.value.hint or "")


def test_sidecars_of_several_seeds_get_a_row_more() -> None:
    tokens = torch.arange(60).reshape(3, 20) % 300
    made = [make_sidecar(4), make_sidecar(4)]
    made[1] = replace(made[1], calibration=made[1].calibration.model_copy(update={"seed": 7}))
    rows = evaluate_on_tokens(make_tiny_llama(), made, tokens=tokens)
    assert [row.name for row in rows][1:] == ["sidecar 1", "sidecar 2", "sidecar over 2 seeds"]
    assert rows[-1].seeds == (0, 7)


def test_without_a_sidecar_there_is_nothing_to_compare() -> None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match="no sidecar and no baseline is given") as caught:
        evaluate_on_tokens(make_tiny_llama(), [], tokens=tokens)
    assert "kvq.calibrate" in (caught.value.hint or "")
