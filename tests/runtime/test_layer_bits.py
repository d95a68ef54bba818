"""Layers of different widths: each is as in a cache that has its widths in every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_formats.config import KVQConfig
from kvq_formats.effective_bits import effective_bits
from kvq_formats.errors import KVQError
from kvq_kernels.launch_table import decode_launch
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, cache_bytes, packed_layers
from kvq_runtime.memory import plan_memory
from kvq_runtime.page_codec import SidecarPageCodec, page_codecs
from kvq_runtime.scratch import kernel_scratch_bytes
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

LAYER_BITS = {0: (2, 4), 1: (3, 2)}
TOKENS, STEPS = 520, 3
IDS = torch.randint(3, 300, (2, TOKENS + STEPS), generator=torch.Generator().manual_seed(0))


def of_one_layer(layer_idx: int) -> LlamaForCausalLM:
    """A tiny Llama in which only that layer's attention counts."""
    model = make_tiny_llama(max_position_embeddings=2048)
    for other, layer in enumerate(model.model.layers):
        if other != layer_idx:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


def fed(model: LlamaForCausalLM, rule: Any, **widths: Any) -> Tensor:
    """Logits of a prompt and of single tokens after it."""
    with torch.no_grad(), attach(model, make_sidecar(model=model, **widths), rule=rule):
        if rule == "evaluation":
            return model(IDS).logits
        found = model(IDS[:, :TOKENS])
        cache, logits = found.past_key_values, [found.logits]
        logits += [
            model(IDS[:, at : at + 1], past_key_values=cache).logits
            for at in range(TOKENS, TOKENS + STEPS)
        ]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("rule", ["runtime", "evaluation"])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_layer_is_read_with_its_own_widths(layer_idx: int, rule: str) -> None:
    """Bit by bit: no other layer's attention reaches the logits, whatever its widths."""
    model = of_one_layer(layer_idx)
    own, other = (
        {"key_bits": LAYER_BITS[i][0], "value_bits": LAYER_BITS[i][1]}
        for i in (layer_idx, 1 - layer_idx)
    )
    mixed = fed(model, rule, layer_bits=LAYER_BITS)
    assert torch.equal(mixed, fed(model, rule, **own))
    assert (mixed - fed(model, rule, **other)).abs().max() > 1e-2


@torch.no_grad()
def test_pages_are_of_their_layers_widths() -> None:
    model = make_tiny_llama(max_position_embeddings=2048)
    with attach(model, make_sidecar(model=model, layer_bits=LAYER_BITS)):
        cache = model(IDS[:, :TOKENS]).past_key_values
        for layer, (key_bits, value_bits) in zip(cache.layers, LAYER_BITS.values(), strict=True):
            key, value = layer.pool.whole()
            assert (key.words.shape[2], value.words.shape[2]) == (key_bits, value_bits)
    with attach(model, make_sidecar(model=model, key_bits=2, value_bits=4)):
        alike = model(IDS[:, :TOKENS]).past_key_values
    # Nothing that is quantized comes before the first layer.
    for stored, expected in zip(
        cache.layers[0].pool.whole(), alike.layers[0].pool.whole(), strict=True
    ):
        for name, tensor in vars(stored).items():
            assert torch.equal(tensor, getattr(expected, name))


@torch.no_grad()
def test_generate_and_caches_of_other_widths() -> None:
    model = make_tiny_llama(max_position_embeddings=2048)
    sidecar = make_sidecar(model=model, layer_bits=LAYER_BITS)
    prompt = IDS[:1, :300]
    how: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    with attach(model, sidecar):
        once = model.generate(prompt, max_new_tokens=5, **how)
        cache = PackedCache(model, sidecar, capacity=310)
        assert torch.equal(
            model.generate(prompt, max_new_tokens=5, past_key_values=cache, **how), once
        )
    # The widths that both layers have where they are named as the largest.
    other = make_sidecar(model=model, layer_bits={0: (2, 4), 1: (3, 4)})
    with attach(model, other), pytest.raises(KVQError, match="another sidecar"):
        model(IDS[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("context", [1, 257, 258, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cache_takes_what_is_planned(context: int, batch_size: int) -> None:
    model = make_tiny_llama()
    sidecar = make_sidecar(layer_bits=LAYER_BITS)
    cache = PackedCache(model, sidecar, capacity=context, batch_size=batch_size)
    assert plan_memory(model, sidecar, context=context, batch_size=batch_size).cache == (
        cache.allocated_bytes
    )


def test_layers_of_equal_widths_are_counted_together() -> None:
    model = make_tiny_llama(num_hidden_layers=5)
    layer_bits = {0: (4, 4), 1: (2, 3), 2: (4, 4), 3: (2, 3), 4: (4, 2)}
    sidecar = make_sidecar(model=model, layer_bits=layer_bits)
    cache = PackedCache(model, sidecar, capacity=900)
    assert cache.allocated_bytes == cache_bytes(
        model.config, sidecar, capacity=900, dtype=torch.float32
    )


@torch.no_grad()
def test_the_bits_that_are_reported_are_the_bytes_that_are_allocated() -> None:
    """``effective_bits`` counts a 16-bit model; positions of exact tokens come on top."""
    model = make_tiny_llama(max_position_embeddings=2048).to(torch.bfloat16)
    sidecar = make_sidecar(model=model, layer_bits=LAYER_BITS)
    tokens = 1 + 4 * 256 + 1
    cache = PackedCache(model, sidecar, capacity=tokens)
    with attach(model, sidecar):
        model(torch.ones(1, tokens, dtype=torch.int64), past_key_values=cache)
    counted = effective_bits(sidecar.config, num_kv_heads=2, head_dim=16, tokens=tokens)
    first, second = (layer.held_bytes for layer in packed_layers(cache))
    # 2 layers of keys and values of 2 heads; positions of a sink and of the tail's page.
    numbers, positions = 2 * 2 * 2 * 16 * tokens, 2 * 4 * (1 + 256)
    # Of a page's 256 x 32 numbers: one layer has 6 bits for a key and a value, the other 5.
    assert first - second == 4 * 256 * 32 * (6 - 5) // 8
    assert 8 * (first + second - positions) == pytest.approx(counted.total * numbers)


@pytest.mark.parametrize("tokens", [1, 512])
def test_scratch_of_kernels_is_enough_for_each_layer(tokens: int) -> None:
    def counted(config: KVQConfig) -> int:
        return kernel_scratch_bytes(
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            window=257,
            tokens=tokens,
            context=4096,
            itemsize=2,
            config=config,
            rows=2,
            device=torch.device("cpu"),
        )

    mixed = KVQConfig().with_layer_bits({0: (4, 2), 1: (2, 3)})
    assert all(counted(mixed) >= counted(layer) > 0 for layer in mixed.layer_counts())
    assert counted(mixed) == counted(KVQConfig(key_bits=4, value_bits=3))


@pytest.mark.parametrize("architecture", ["cpu", "sm_75", "sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_widths_do_not_choose_a_launch(architecture: str, head_dim: int) -> None:
    """What a plan of scratch relies on: all layers share the buffers of one path."""
    launches = {
        decode_launch(
            architecture, bits=(k, v), head_dim=head_dim, rotary_dim=head_dim, group_size=4
        )
        for k in (2, 3, 4)
        for v in (2, 3, 4)
    }
    assert len(launches) == 1


def test_codecs_share_what_pages_are_decoded_into() -> None:
    model = make_tiny_llama()
    codecs = page_codecs(model, make_sidecar(layer_bits=LAYER_BITS))
    first, second = codecs.values()
    assert isinstance(first, SidecarPageCodec)
    assert isinstance(second, SidecarPageCodec)
    assert first.workspace is second.workspace is not None
    assert (first.config.key_bits, second.config.key_bits) == (2, 3)
