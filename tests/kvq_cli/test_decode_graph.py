"""What is said of CUDA graphs; a recording plays one, on kernels that the interpreter runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Kvq
from kvq_cli.decode_graph import decode_graph
from kvq_cli.output import Output
from kvq_formats.errors import KVQError
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache
from kvq_runtime.cuda_graph import CaptureError
from recorded_graph import record
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar


@pytest.fixture
def model_and_cache() -> Iterator[tuple[Any, PackedCache]]:
    model = make_tiny_llama(num_hidden_layers=1)
    sidecar = make_sidecar(3, model=model)
    with torch.no_grad(), attach(model, sidecar, impl="triton"):
        yield model, PackedCache(model, sidecar, capacity=20)


def generate(model: Any, cache: PackedCache) -> None:
    model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=3)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvq_runtime.captured_decode.check_cuda", lambda _: None)
    monkeypatch.setattr("kvq_runtime.captured_decode.capture_cuda_graph", record)


@pytest.mark.usefixtures("stand_in")
def test_tokens_are_replayed(
    model_and_cache: tuple[Any, PackedCache], capsys: pytest.CaptureFixture[str]
) -> None:
    with decode_graph(Output(), *model_and_cache, wanted=None) as used:
        generate(*model_and_cache)
    assert used.to_json() == {"replays": 2, "reason": None}
    assert capsys.readouterr().err == ""
    with decode_graph(Output(), *model_and_cache, wanted=False) as used:
        model_and_cache[1].reset()
        generate(*model_and_cache)
    assert used.to_json() == {"replays": 0, "reason": None}


@pytest.mark.usefixtures("stand_in")
def test_a_model_that_cannot_be_captured(
    model_and_cache: tuple[Any, PackedCache],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise CaptureError("the model does what it does.", hint="none")

    monkeypatch.setattr("kvq_runtime.captured_decode.capture_cuda_graph", refuse)
    with decode_graph(Output(), *model_and_cache, wanted=None) as used:
        generate(*model_and_cache)
    assert used.to_json() == {"replays": 0, "reason": "the model does what it does."}
    assert "decoded from Python: the model does what it does." in capsys.readouterr().err
    model_and_cache[1].reset()
    with decode_graph(Output(), *model_and_cache, wanted=True), pytest.raises(CaptureError):
        generate(*model_and_cache)


def test_without_a_gpu_nothing_is_said(
    model_and_cache: tuple[Any, PackedCache], capsys: pytest.CaptureFixture[str]
) -> None:
    with decode_graph(Output(), *model_and_cache, wanted=None) as used:
        pass
    assert used.captured is None
    assert "need a CUDA or ROCm GPU" in str(used.reason)
    assert capsys.readouterr().err == ""
    with (
        pytest.raises(KVQError, match="need a CUDA or ROCm GPU"),
        decode_graph(Output(), *model_and_cache, wanted=True),
    ):
        pass


def test_the_command(kvq: Kvq, sidecar: Path) -> None:
    given = ("generate", "--sidecar", sidecar, "-p", "they would go", "--max-new-tokens", 3)
    ran = kvq(*given, "--json")
    assert ran.json["cuda_graph"]["replays"] == 0
    assert "the model is on cpu" in ran.json["cuda_graph"]["reason"]
    assert kvq(*given, "--no-cuda-graph", "--json").json["cuda_graph"]["reason"] is None
    refused = kvq(*given, "--cuda-graph", "--json")
    assert refused.code == 1
    error = refused.json["error"]
    assert error["message"] == "CUDA graphs need a CUDA or ROCm GPU; the model is on cpu."
    assert "--no-cuda-graph" in error["hint"]
    assert 'model.to("cuda")' in error["hint"]


def test_what_contradicts_a_graph(kvq: Kvq, sidecar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("generate", "--sidecar", sidecar, "-p", "they would go", "--max-new-tokens", 3)
    refused = kvq(*given, "--impl", "reference", "--cuda-graph", "--json")
    assert refused.code == 2
    error = refused.json["error"]
    assert error["message"] == (
        "--cuda-graph captures Triton kernels, and --impl reference runs none."
    )
    assert error["hint"] == "leave one of them out"
    assert kvq(*given, "--impl", "reference", "--no-cuda-graph").code == 0
    # What the command line says overrules the environment.
    monkeypatch.setenv("KVQ_CUDA_GRAPH", "1")
    assert kvq(*given, "--impl", "reference").code == 0
    monkeypatch.delenv("KVQ_CUDA_GRAPH")
    monkeypatch.setenv("KVQ_IMPL", "reference")
    assert kvq(*given, "--cuda-graph", "--json").code == 1
    monkeypatch.setenv("KVQ_CUDA_GRAPH", "1")
    assert kvq(*given).code == 2


@pytest.mark.parametrize("silent", [False, True])
def test_a_choice_is_not_commented(
    model_and_cache: tuple[Any, PackedCache],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    silent: bool,
) -> None:
    """On a GPU a refusal is a note, but not of attention that was asked for."""
    model, cache = model_and_cache
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr("kvq_runtime.captured_decode.check_cuda", lambda _: None)
    cache.layers[0].capacity = None
    with decode_graph(Output(), model, cache, wanted=None, silent=silent) as used:
        pass
    assert "the cache grows" in str(used.reason)
    assert ("each token is decoded from Python" in capsys.readouterr().err) is not silent
