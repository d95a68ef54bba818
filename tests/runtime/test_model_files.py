from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvq_formats.errors import ModelError
from kvq_runtime.model_files import (
    check_files,
    check_repository_name,
    check_weights,
    has_tokenizer,
)


@pytest.mark.parametrize(
    "repo_id",
    ["meta-llama/Llama-2-7b", "meta-llama/Llama-2-70b-chat", "meta-llama/CodeLlama-7b-Python"],
)
def test_original_repositories_are_known_without_network(repo_id: str) -> None:
    with pytest.raises(ModelError, match=r"consolidated.*not transformers weights") as caught:
        check_repository_name(repo_id)
    assert caught.value.hint == f"use {repo_id}-hf"


@pytest.mark.parametrize(
    "repo_id", ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "someone/Llama-2-7b"]
)
def test_other_repositories_pass(repo_id: str) -> None:
    check_repository_name(repo_id)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["consolidated.00.pth", "params.json", "tokenizer.model"], r"authors \(consolidated\.00"),
        (["config.json", "consolidated.safetensors"], "in the format of its authors"),
        (["model-Q4_K_M.gguf", "config.json"], r"GGUF weights \(model-Q4_K_M\.gguf\)"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "as a pickle"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
        (["kvq.safetensors", "kvq_config.json"], "is a kvq sidecar, not a model"),
        (["config.json", "tokenizer.json"], r"no weights \(model\.safetensors\)"),
        (["model.safetensors"], r"no config\.json"),
        ([], r"no config\.json"),
    ],
)
def test_says_what_is_there_instead(names: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check_files(names, name="org/model", is_local=False)
    assert caught.value.hint


def test_original_weights_hint_at_the_twin() -> None:
    with pytest.raises(ModelError) as caught:
        check_files(["consolidated.00.pth"], name="org/model", is_local=False)
    assert caught.value.hint == "use org/model-hf, if there is one"


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_complete_models_pass(weights: str) -> None:
    # Extra formats beside do not matter.
    check_files(
        ["config.json", weights, "pytorch_model.bin", "model.gguf"], name="m", is_local=True
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["tokenizer.json"], True),
        (["qwen.tiktoken"], True),
        (["spiece.model"], True),
        (["config.json", "model.safetensors"], False),
    ],
)
def test_finds_a_tokenizer(names: list[str], found: bool) -> None:
    assert has_tokenizer(names) is found


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        check_weights(folder)


def test_shards_are_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_weights(folder)
    index.write_text(json.dumps({"weight_map": {"a": names[0]}}))
    check_weights(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        check_weights(folder)
