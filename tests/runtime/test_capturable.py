from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvq_formats.errors import KVQError
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache
from kvq_runtime.capturable import check_capturable
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
        (spread, "lie on cpu, meta"),
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
