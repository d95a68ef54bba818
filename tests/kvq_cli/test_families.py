"""Calibrate, eval and generate on models whose attention is not Llama's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvq
from families import FAMILIES
from unheard import write_unheard

SMALL = ("--num-samples", 2, "--seq-len", 128)


def with_tokenizer(folder: Path, tiny_model_dir: Path) -> Path:
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def saved(title: str, folder: Path, tiny_model_dir: Path, **options: Any) -> Path:
    FAMILIES[title].make(vocab_size=320, **options).save_pretrained(folder)
    return with_tokenizer(folder, tiny_model_dir)


def check_the_three_commands(
    kvq: Kvq, folder: Path, text_file: Path, tmp_path: Path, *more: object
) -> None:
    q = tmp_path / "q"
    assert kvq("calibrate", folder, "-o", q, "--dataset", text_file, *SMALL, *more).code == 0
    ran = kvq("eval", folder, "--sidecar", q, "--ppl", text_file, "--limit", 2, "--json", *more)
    assert ran.code == 0
    (text,) = ran.json["texts"]
    assert text["rows"][-1]["kl"] > 0
    ran = kvq("generate", folder, "--sidecar", q, "-p", "the of and", "--max-new-tokens", 5, *more)
    assert ran.code == 0
    assert "tokens are held" in ran.stderr


@pytest.mark.parametrize("title", ["Phi-2", "SmolLM3", "Gemma 3", "Qwen3-Next"])
def test_families(
    kvq: Kvq, title: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = saved(title, tmp_path / "model", tiny_model_dir)
    check_the_three_commands(kvq, folder, text_file, tmp_path)


def test_a_family_in_code_of_its_own(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(write_unheard(tmp_path, {}), tiny_model_dir)
    refused = kvq("calibrate", folder, "--dataset", text_file, *SMALL)
    assert refused.code == 1
    assert "--trust-remote-code" in refused.stderr
    check_the_three_commands(kvq, folder, text_file, tmp_path, "--trust-remote-code")


def test_windows_in_every_layer(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = saved(
        "Mistral with a sliding window", tmp_path / "model", tiny_model_dir, sliding_window=512
    )
    check_the_three_commands(kvq, folder, text_file, tmp_path)
    ran = kvq("generate", folder, "--sidecar", tmp_path / "q", "-p", "the of", "--context", "1k")
    assert ran.code != 0
    assert "all layers of" in ran.stderr
    assert "within a window of 512 tokens" in " ".join(ran.stderr.split())
    assert "--context 512" in ran.stderr


def test_what_is_not_understood_is_refused_before_weights_load(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)"
    folder = write_unheard(tmp_path, {rotate: f"{rotate}; key_states = key_states * 2"})
    with_tokenizer(folder, tiny_model_dir)

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", load)
    for dry_run in ((), ("--dry-run",)):
        ran = kvq(
            "calibrate", folder, "--dataset", text_file, *SMALL, "--trust-remote-code", *dry_run
        )
        assert ran.code == 1
        assert "changes the keys of layer 0 between RoPE and attention" in " ".join(
            ran.stderr.split()
        )
    assert sorted(tmp_path.iterdir()) == [folder]
