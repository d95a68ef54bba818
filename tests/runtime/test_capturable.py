from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvq_formats.errors import KVQError
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache
from kvq_runtime.capturable import check_capturable, check_cuda, check_token_ids
from tiny_models import make_tiny_family, make_tiny_llama
from tiny_sidecars import make_sidecar


def error_of(model: Any, *, impl: Any = "triton", cache: Any = None) -> KVQError:
    sidecar = make_sidecar(3, model=model)
    with attach(model, sidecar, impl=impl):
        cache = PackedCache(model, sidecar, capacity=8) if cache is None else cache
        with pytest.raises(KVQError) as found:
            check_capturable(model, cache)
    return found.value


def test_a_model_that_can_be_captured() -> None:
    model = make_tiny_llama()
    sidecar = make_sidecar(3)
    with attach(model, sidecar, impl="triton"):
        cache = PackedCache(model, sidecar, capacity=8)
        assert check_capturable(model, cache) == torch.device("cpu")
    with pytest.raises(KVQError, match="this one is not") as found:
        check_capturable(model, cache)
    assert "kvq.attach" in found.value.hint


def test_caches_that_move() -> None:
    model = make_tiny_llama()
    growing = error_of(model, cache=PackedCache(model, make_sidecar(3)))
    assert "grows" in growing.message
    assert growing.hint == "kvq.PackedCache(model, sidecar, capacity=N)"
    assert "a DynamicCache was passed" in error_of(model, cache=DynamicCache()).message
    windows = make_tiny_family(
        "gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    assert "sliding window" in error_of(windows).message


def test_caches_of_others() -> None:
    model = make_tiny_llama()
    for layers in (1, 6):
        other = make_tiny_llama(num_hidden_layers=layers)
        cache = PackedCache(other, make_sidecar(3, model=other), capacity=8)
        error = error_of(model, cache=cache)
        assert f"it has {layers} layers, expected {len(model.model.layers)}" in error.message
        assert "kvq.PackedCache" in error.hint
    cache = PackedCache(model, make_sidecar(2), capacity=8)
    assert "another sidecar or model" in error_of(model, cache=cache).message


def test_a_rule_without_a_packed_cache() -> None:
    model, sidecar = make_tiny_llama(), make_sidecar(3)
    cache = PackedCache(model, sidecar, capacity=8)
    with (
        attach(model, sidecar, rule="evaluation"),
        pytest.raises(KVQError, match="a rule that has no packed cache") as found,
    ):
        check_capturable(model, cache)
    assert "rule='runtime'" in found.value.hint
    assert "rule='exact-prefill'" in found.value.hint


def test_no_gpu() -> None:
    with pytest.raises(KVQError, match="need a CUDA or ROCm GPU; the model is on cpu") as found:
        check_cuda(torch.device("cpu"))
    assert 'model.to("cuda") before kvq.attach' in found.value.hint
    check_cuda(torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], "token_ids is a list, expected a tensor of integers"),
        (torch.ones(2).numpy(), "token_ids is a ndarray"),
        (3, "token_ids is a int"),
        (torch.ones(2), "token_ids is of torch.float32"),
        (torch.ones(2, dtype=torch.bool), "token_ids is of torch.bool"),
        (torch.ones(2, dtype=torch.complex64), "token_ids is of torch.complex64"),
        (torch.ones(1, 2, dtype=torch.int64), r"token_ids is \[1, 2\]; the cache holds 2 rows"),
        (torch.ones((), dtype=torch.int64), r"token_ids is \[\]"),
    ],
)
def test_what_is_no_token_of_each_row(given: Any, message: str) -> None:
    with pytest.raises(KVQError, match=message) as found:
        check_token_ids(given, 2)
    assert found.value.hint == "an integer tensor of shape [2] or [2, 1]"
    for fits in (torch.ones(2, dtype=torch.int32), torch.ones(2, 1, dtype=torch.int64)):
        check_token_ids(fits, 2)


def test_attention_that_asks_the_host() -> None:
    error = error_of(make_tiny_llama(), impl="reference")
    assert "attention runs on 'reference'" in error.message
    assert "--impl triton" in error.hint


def dynamic(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def nested(model: Any) -> None:
    model.config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}


def spread(model: Any) -> None:
    model.register_buffer("elsewhere", torch.empty(1, device="meta"))


def frozen(model: Any) -> None:
    with torch.inference_mode():
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq.clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dynamic, "rotation is 'dynamic'"),
        (nested, "rotation is 'longrope'"),
        (spread, r"lie on several devices \(cpu, meta\)"),
        (frozen, "loaded in inference mode"),
    ],
)
def test_models_that_cannot(change: Callable[[Any], None], message: str) -> None:
    model = make_tiny_llama()
    sidecar = make_sidecar(3)
    with attach(model, sidecar, impl="triton"):
        cache = PackedCache(model, sidecar, capacity=8)
        change(model)
        with pytest.raises(KVQError, match=message) as found:
            check_capturable(model, cache)
    assert found.value.hint
