"""The packed cache of a model: what it is made of, what it takes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from kvq_formats.effective_bits import effective_bits
from kvq_formats.errors import CacheFullError, ConfigError, FingerprintMismatchError, KVQError
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, cache_bytes, packed_layers
from kvq_runtime.layer import PackedLayer
from tiny_models import make_tiny_family, make_tiny_llama
from tiny_sidecars import make_sidecar

WINDOW = 64


def ids(tokens: int = 300, rows: int = 1) -> Tensor:
    return torch.randint(3, 199, (rows, tokens), generator=torch.Generator().manual_seed(0))


def make_gemma() -> PreTrainedModel:
    """Every other layer has a window."""
    return make_tiny_family("gemma2", head_dim=16, sliding_window=WINDOW)


@torch.no_grad()
def test_windows_keep_the_stock_layer() -> None:
    model = make_gemma()
    with attach(model, make_sidecar(model=model)):
        cache = model(ids()).past_key_values
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, PackedLayer]
    assert cache.get_seq_length() == 300
    assert cache.get_mask_sizes(5, 0) == (WINDOW - 1 + 5, 300 - WINDOW + 1)
    assert cache.get_mask_sizes(5, 1) == (305, 0)
    assert cache.is_sliding == [True, False]
    assert not cache.is_compileable
    assert cache.is_initialized


@pytest.mark.parametrize("given", [None, DynamicCache(), "with a config"])
@torch.no_grad()
def test_a_cache_that_is_passed_becomes_a_packed_one(given: Any) -> None:
    model = make_tiny_llama()
    if given == "with a config":
        given = DynamicCache(config=model.config)
    with attach(model, make_sidecar()):
        out = model(ids(), past_key_values=given, use_cache=True)
        assert isinstance(out.past_key_values, PackedCache)
        assert given is None or out.past_key_values is given
        model(ids(1), past_key_values=out.past_key_values)
    assert out.past_key_values.tokens_held == [301]


@torch.no_grad()
def test_without_use_cache_pages_are_read_and_no_cache_comes_back() -> None:
    model, text = make_tiny_llama(), ids(600)
    stock = model(text).logits
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options["attention_mask"] = torch.ones_like(text)
    with attach(model, make_sidecar(2)):
        expected = model(text).logits
        found = model(text, use_cache=False)
        assert torch.equal(found.logits, expected)
        assert (expected - stock)[:, 300:].abs().max() > 1e-2
        assert found.past_key_values is None
        first, *others = model(text, use_cache=False, return_dict=False)
        assert torch.equal(first, expected)
        assert others == []
        again = model.generate(text, use_cache=False, **options)
        assert torch.equal(again, model.generate(text, **options))
        cache = PackedCache(model, make_sidecar(2))
        assert model(text, use_cache=False, past_key_values=cache).past_key_values is cache


@torch.no_grad()
def test_caches_of_other_kinds_are_refused() -> None:
    model = make_tiny_llama()
    full = DynamicCache(config=model.config)
    model(ids(5), past_key_values=full, use_cache=True)
    static = StaticCache(config=model.config, max_cache_len=64)
    quantized = QuantizedCache("fp8", model.config)
    with attach(model, make_sidecar()):
        for cache, words in (
            (full, "5 tokens that are not quantized"),
            (static, "StaticCache was passed"),
            (quantized, "QuantizedCache was passed"),
        ):
            with pytest.raises(KVQError, match=words) as caught:
                model(ids(), past_key_values=cache)
            assert caught.value.hint
        with pytest.raises(KVQError, match="StaticCache was passed"):
            model.generate(
                ids(), attention_mask=torch.ones_like(ids()), cache_implementation="static",
                max_new_tokens=2,
            )  # fmt: skip


@torch.no_grad()
def test_a_cache_belongs_to_its_sidecar_and_outlives_an_attachment() -> None:
    model, sidecar = make_tiny_llama(), make_sidecar(3)
    with attach(model, sidecar):
        cache = model(ids()).past_key_values
    with pytest.raises(KVQError, match="outside of") as caught:
        model(ids(1), past_key_values=cache)
    assert "kvq.attach" in str(caught.value.hint)
    with (
        attach(model, make_sidecar(3, half_range=3.0)),
        pytest.raises(KVQError, match="another sidecar"),
    ):
        model(ids(1), past_key_values=cache)
    # What failed has stored nothing, and an equal sidecar goes on with the cache.
    assert cache.tokens_held == [300]
    with attach(model, make_sidecar(3)):
        model(ids(1), past_key_values=cache)
    assert cache.tokens_held == [301]


@torch.no_grad()
def test_an_explicit_cache_with_a_capacity() -> None:
    model, sidecar = make_tiny_llama(), make_sidecar(3)
    cache = PackedCache(model, sidecar, capacity=601, batch_size=2)
    allocated = cache.allocated_bytes
    assert allocated == cache_bytes(
        model.config, sidecar, capacity=601, batch_size=2, dtype=torch.float32
    )
    assert (cache.get_max_length(), cache.tokens_held) == (601, [0, 0])
    with attach(model, sidecar):
        model(ids(600, 2), past_key_values=cache)
        model(ids(1, 2), past_key_values=cache)
        with pytest.raises(CacheFullError, match="room for 601 tokens a row; 601 are used") as full:
            model(ids(1, 2), past_key_values=cache)
    assert "--context" in str(full.value.hint)
    assert cache.allocated_bytes == allocated == cache.held_bytes
    assert cache.tokens_held == [601, 601]
    assert cache.bf16_bytes == 2 * 2 * 601 * 2 * 16 * 2 * 2


@pytest.mark.parametrize("capacity", [0, -5])
def test_a_capacity_that_makes_no_sense(capacity: int) -> None:
    with pytest.raises(ConfigError, match=f"capacity is {capacity}"):
        PackedCache(make_tiny_llama(), make_sidecar(), capacity=capacity)


def test_the_sidecar_of_another_model(tmp_path: Path) -> None:
    make_sidecar().save(tmp_path / "s")
    assert PackedCache(make_tiny_llama(), tmp_path / "s").tokens_held == []
    with pytest.raises(FingerprintMismatchError):
        PackedCache(make_tiny_llama(num_hidden_layers=3), tmp_path / "s")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"recent_tokens": 100, "sink_tokens": 4}])
@torch.no_grad()
def test_the_bits_that_are_reported_are_the_bytes_that_are_allocated(
    bits: int, options: dict[str, int]
) -> None:
    """``effective_bits`` counts a 16-bit model; positions of exact tokens come on top."""
    model = make_tiny_llama(max_position_embeddings=2048).to(torch.bfloat16)
    sidecar = make_sidecar(bits, model=model, **options)
    sinks, recent = sidecar.config.sink_tokens, sidecar.config.recent_tokens
    tokens = sinks + recent + 4 * 256 + 1
    cache = PackedCache(model, sidecar, capacity=tokens)
    with attach(model, sidecar):
        model(ids(tokens), past_key_values=cache)
    counted = effective_bits(sidecar.config, num_kv_heads=2, head_dim=16, tokens=tokens)
    numbers = 2 * 2 * 16 * tokens
    positions = 4 * (sinks + recent + 256)
    for layer in packed_layers(cache):
        assert layer.held_bytes == layer.allocated_bytes
        assert 8 * (layer.allocated_bytes - positions) == pytest.approx(counted.total * numbers)


@torch.no_grad()
def test_bytes_of_windows_are_counted() -> None:
    model = make_gemma()
    sidecar = make_sidecar(model=model)
    cache = PackedCache(model, sidecar, capacity=300)
    with attach(model, sidecar):
        model(ids(300), past_key_values=cache)
    stock = 2 * (WINDOW - 1) * 2 * 16 * 4
    assert cache.allocated_bytes - stock == next(packed_layers(cache)).allocated_bytes
    assert cache.bf16_bytes == 2 * 2 * 16 * 2 * (300 + WINDOW - 1)
    assert cache.allocated_bytes == cache_bytes(
        model.config, sidecar, capacity=300, dtype=torch.float32
    )


@torch.no_grad()
def test_operations_of_caches_go_to_every_layer() -> None:
    model = make_tiny_llama()
    with attach(model, make_sidecar()):
        cache = model(ids(300, 2)).past_key_values
        cache.crop(-10)
        assert cache.get_seq_length() == 290
        cache.batch_repeat_interleave(2)
        assert cache.tokens_held == [290] * 4
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        twice = model(ids(3, 2), past_key_values=cache).logits
        cache.reset()
        assert cache.tokens_held == [0, 0]
        again = model(ids(290, 2).flip(0), past_key_values=cache)
        assert again.past_key_values is cache
    assert twice.isfinite().all()
    assert isinstance(cache, Cache)


@torch.no_grad()
def test_a_forward_that_fails_between_layers_is_noticed_and_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = make_tiny_llama(), ids(302)
    with attach(model, make_sidecar(3)):
        cache = PackedCache(model, make_sidecar(3), capacity=400)
        model(text[:, :300], past_key_values=cache)

        def interrupted(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[0].mlp, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(text[:, 300:301], past_key_values=cache)
        with pytest.raises(KVQError, match="between the layers") as caught:
            model(text[:, 300:301], past_key_values=cache)
        assert "cache.crop(300)" in str(caught.value.hint)
        cache.crop(300)
        mended = model(text[:, 300:301], past_key_values=cache).logits
        cache.reset()
        model(text[:, :300], past_key_values=cache)
        assert torch.equal(model(text[:, 300:301], past_key_values=cache).logits, mended)


@torch.no_grad()
def test_a_page_that_fails_leaves_a_torn_cache_and_nothing_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = make_tiny_llama(), ids(600)
    with attach(model, make_sidecar(3)):
        cache = PackedCache(model, make_sidecar(3), capacity=601)
        expected = model(text, past_key_values=cache).logits
        cache.reset()
        model(text[:, :200], past_key_values=cache)

        def full(*_: Any, **__: Any) -> Any:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("kvq_formats.pages.encode_values", full)
            with pytest.raises(MemoryError):
                model(text[:, 200:], past_key_values=cache)
        with pytest.raises(KVQError, match="not whole") as caught:
            model(text[:, 200:201], past_key_values=cache)
        assert "cache.reset()" in str(caught.value.hint)
        assert all(layer._readings == [] for layer in packed_layers(cache))
        cache.reset()
        assert torch.equal(model(text, past_key_values=cache).logits, expected)
    assert all(layer.pool.used_pages == 2 for layer in packed_layers(cache))


@torch.no_grad()
def test_another_batch_after_a_reset() -> None:
    model = make_tiny_llama()
    with attach(model, make_sidecar()):
        cache = model(ids(300, 2)).past_key_values
        assert cache.batch_size == 2
        cache.reset()
        model(ids(10, 3), past_key_values=cache)
        assert (cache.batch_size, cache.tokens_held) == (3, [10, 10, 10])
        fixed = PackedCache(model, make_sidecar(), capacity=400)
        with pytest.raises(KVQError, match="holds 1 rows and got 3") as caught:
            model.generate(ids(10), past_key_values=fixed, num_beams=3, max_new_tokens=2)
    assert "batch_size=3" in str(caught.value.hint)


@torch.no_grad()
def test_a_cache_of_a_model_that_rotates_otherwise_is_refused() -> None:
    model, other = make_tiny_llama(), make_tiny_llama()
    other.model.rotary_emb.inv_freq.mul_(0.5)
    with attach(other, make_sidecar()):
        cache = other(ids()).past_key_values
    with attach(model, make_sidecar()), pytest.raises(KVQError, match="another sidecar or model"):
        model(ids(1), past_key_values=cache)


def test_weights_of_one_byte_are_no_dtype_for_keys() -> None:
    model = make_tiny_llama().to(torch.bfloat16)
    for parameter in model.model.layers[0].self_attn.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    cache = PackedCache(model, make_sidecar(), capacity=10)
    assert {layer.exact.keys.dtype for layer in packed_layers(cache)} == {torch.bfloat16}


@torch.no_grad()
def test_what_generate_sets_on_stock_layers_stays() -> None:
    """Prompt lookup tells layers with a window to record what it may have to take back."""
    options = {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
    model = make_tiny_family("gemma2", max_position_embeddings=1024, **options)
    text = ids(40).repeat(1, 3)
    asked: dict[str, Any] = {
        "max_new_tokens": 20,
        "do_sample": False,
        "prompt_lookup_num_tokens": 4,
    }
    mask = torch.ones_like(text)
    expected = model.generate(text, attention_mask=mask, **asked)
    with attach(model, make_sidecar(model=model)):
        # Shorter than a page: nothing is read from codes.
        found = model.generate(text, attention_mask=mask, **asked)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_count_to_keep_reaches_windows_too() -> None:
    model = make_gemma()
    with attach(model, make_sidecar(model=model)):
        for count in (40, -10):
            cache = model(ids(50)).past_key_values
            cache.crop(count)
            assert {layer.get_seq_length() for layer in cache.layers} == {40}
            assert cache.tokens_held == [40]
            assert model(ids(1), past_key_values=cache).logits.isfinite().all()
    with pytest.raises(ConfigError, match="batch_size is 0"):
        PackedCache(model, make_sidecar(model=model), batch_size=0)
