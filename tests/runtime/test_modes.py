"""A packed cache is the same in every mode of torch that a forward may run in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from kvq_kernels.attention import AttentionOptions
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, packed_layers
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar


def ids(tokens: int) -> Tensor:
    return torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_may_be_begun_in_one_mode_and_used_in_another(
    first: type[AbstractContextManager[None]], then: type[AbstractContextManager[None]]
) -> None:
    model, text = make_tiny_llama(), ids(900)
    with attach(model, make_sidecar(3)):
        with first():
            cache = model(text[:, :300]).past_key_values
        with then():
            # Pages are packed, slabs added and the table grows.
            logits = model(text[:, 300:], past_key_values=cache).logits
            cache.batch_repeat_interleave(2)
            cache.crop(-1)
            model(text[:, -1:].expand(2, 1), past_key_values=cache)
        with torch.no_grad():
            cache = model(text[:, :300]).past_key_values
            expected = model(text[:, 300:], past_key_values=cache).logits
    assert torch.equal(logits, expected)


def test_no_graph_grows_with_the_cache() -> None:
    model = make_tiny_llama()
    with attach(model, make_sidecar(3)):
        cache = PackedCache(model, make_sidecar(3), capacity=400)
        for piece in ids(310).split([300, *[1] * 10], dim=1):
            logits = model(piece, past_key_values=cache).logits
    # The model around attention has gradients, what is cached has none.
    assert logits.requires_grad
    for layer in packed_layers(cache):
        stored = (layer.exact.keys, layer.exact.values, layer.pool.slabs[0].value.scales)
        assert not any(tensor.requires_grad or tensor.grad_fn for tensor in stored)


@torch.no_grad()
def test_autocast_changes_the_model_and_not_the_cache() -> None:
    model, text = make_tiny_llama(), ids(300)
    with attach(model, make_sidecar(3)), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(text).logits
        stored = model(text).past_key_values
    layer = next(packed_layers(stored))
    assert logits.isfinite().all()
    # Projected keys are bf16 there, and are kept as they came.
    assert layer.exact.keys.dtype == torch.bfloat16
    assert layer.rows[0].pages


@torch.no_grad()
def test_attention_is_f32_under_autocast() -> None:
    model, text = make_tiny_llama(), ids(300)
    with attach(model, make_sidecar(3)):
        layer = next(packed_layers(model(text).past_key_values))
        query = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(1))
        key = value = torch.zeros(1, 2, 1, 16)
        outputs = []
        for enabled in (False, True):
            layer.append(key, value)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs.append(layer.attend(query, AttentionOptions(scaling=0.25), rule="runtime"))
            layer.crop(-1)
    assert torch.equal(*outputs)
