"""The runtime rule through stock models: nothing lost but what pages lose, however text is fed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from exact_pages import ExactPageCodec, exact_codecs
from families import FAMILIES
from garbage import with_garbage_codebooks
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach
from kvq_runtime.cache import packed_layers
from kvq_runtime.layer import PackedLayer
from kvq_runtime.runtime_rule import attach_pages, attention_options
from padded_batches import batch, fed
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

EPS = torch.finfo(torch.float32).eps

ONE_SUM = 64 * EPS
"""What rounding adds to a sum over the 64 channels of a hidden state, in units of the largest."""

SUMS = 8 * ONE_SUM
"""The same through two layers, whose attention and MLP take four such sums in a row each."""


@pytest.mark.parametrize("title", ["Llama 3.x", "Gemma 2", "gpt-oss", "GLM-4", "SmolLM3", "Phi-2"])
@pytest.mark.parametrize("how", ["greedy", "beams", "sampled", "chunked"])
@torch.no_grad()
def test_generate_gives_what_the_stock_model_gives(title: str, how: str) -> None:
    family = FAMILIES[title]
    model = family.make()
    ids, mask, _ = batch(290, 11)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": how == "sampled"}
    options |= {"beams": {"num_beams": 3}, "chunked": {"prefill_chunk_size": 100}}.get(how, {})

    def generated() -> Tensor:
        torch.manual_seed(4)
        return model.generate(ids, attention_mask=mask, **options)

    stock = generated()
    with attach_pages(model, exact_codecs(model, family.rotary_channels)):
        assert torch.equal(generated(), stock)
    assert torch.equal(generated(), stock)


@torch.no_grad()
def test_assisted_generation_rolls_back() -> None:
    model, assistant = make_tiny_llama(), make_tiny_llama(seed=3, num_hidden_layers=1)
    ids = torch.randint(3, 300, (1, 250), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    mask = torch.ones_like(ids)
    stock = model.generate(ids, attention_mask=mask, **options)
    with attach_pages(model, exact_codecs(model, recent_tokens=32)):
        found = model.generate(ids, attention_mask=mask, assistant_model=assistant, **options)
    assert torch.equal(found, stock)


@torch.no_grad()
def test_several_turns_of_generate_on_one_cache() -> None:
    model = make_tiny_llama()
    ids = torch.randint(3, 300, (1, 300), generator=torch.Generator().manual_seed(0))
    more = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))

    def two_turns(cache: Any) -> Tensor:
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        first = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options
        )
        longer = torch.cat([first, more], dim=1)
        return model.generate(
            longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **options
        )

    stock = two_turns(DynamicCache(config=model.config))
    with attach_pages(model, exact_codecs(model)):
        assert torch.equal(two_turns(DynamicCache(config=model.config)), stock)
        assert torch.equal(two_turns(DynamicCache()), stock)


# What is fed how.


def pages_of(layer: PackedLayer, row: int) -> tuple[Any, Any]:
    ((key, value),) = layer.pool.read(layer.rows[row].pages)
    return key, value


# The second page is complete with token 513 of the row without padding, token 550 of the other.
CHUNKS = [[600], [256, 256, 88], [500, *[1] * 100], [257, 1, 300, 42]]


def assert_same_pages(cache: Any, other: Any) -> None:
    for layer, twin in zip(packed_layers(cache), packed_layers(other), strict=True):
        for row in range(len(layer.rows)):
            for pages, twin_pages in zip(pages_of(layer, row), pages_of(twin, row), strict=True):
                for field, numbers in vars(pages).items():
                    assert torch.equal(getattr(twin_pages, field), numbers), field


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("recent_tokens", [0, 20])
@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "pages", "tokens", "odd"])
@torch.no_grad()
def test_how_a_text_is_fed_makes_no_difference(
    bits: int, recent_tokens: int, chunks: list[int]
) -> None:
    """In f64, against chunks of 100: the same bytes, and the same logits.

    Sums of another shape differ by 1e-15 there, which no decision of the codec notices: the chance
    that one of the 10,000 numbers lies so near to one is below 1e-8.
    """
    model = make_tiny_llama().double()
    sidecar = make_sidecar(bits, half_range=2.0, recent_tokens=recent_tokens)
    ids, mask, positions = batch(600, 37)
    with attach(model, sidecar):
        expected, cache = fed(model, ids, mask, positions, [100] * 6)
        found, other = fed(model, ids, mask, positions, chunks)
    assert_same_pages(cache, other)
    attended = mask.bool()
    # Rotated keys and queries are rounded to f32.
    assert (found - expected)[attended].abs().max() <= ONE_SUM * expected[attended].abs().max()


@torch.no_grad()
def test_a_prefill_sees_what_decoding_would_have_seen() -> None:
    """And not what attention over unquantized keys would see."""
    model, sidecar = make_tiny_llama(), make_sidecar(2)
    ids, mask, positions = batch(700, 0)
    with attach(model, sidecar):
        whole, _ = fed(model, ids, mask, positions, [700])
    with attach(model, sidecar, rule="exact-prefill"):
        exact, _ = fed(model, ids, mask, positions, [700])
    stock = model(ids).logits
    assert torch.equal(exact, stock)
    near, far = slice(0, PAGE_TOKENS), slice(PAGE_TOKENS + 2, None)
    # Up to the end of the first page nothing is read from codes.
    assert (whole[:, near] - stock[:, near]).abs().max() <= SUMS * stock.abs().max()
    assert (whole[:, far] - stock[:, far]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_rows_pages_and_logits_do_not_depend_on_its_batch() -> None:
    model, sidecar = make_tiny_llama(), make_sidecar(3)
    ids, mask, positions = batch(640, 40)
    model = model.double()
    with attach(model, sidecar):
        together, cache = fed(model, ids, mask, positions, [640])
        alone, single = fed(model, ids[:1, 40:], mask[:1, 40:], positions[:1, 40:], [600])
    for layer, twin in zip(packed_layers(cache), packed_layers(single), strict=True):
        for pages, twin_pages in zip(pages_of(layer, 0), pages_of(twin, 0), strict=True):
            for field, numbers in vars(pages).items():
                assert torch.equal(getattr(twin_pages, field), numbers), field
    assert (together[0, 40:] - alone[0]).abs().max() <= ONE_SUM * alone.abs().max()


@pytest.mark.parametrize("offset", [0, 1_000_000, 10_000_000])
@torch.no_grad()
def test_far_positions_change_nothing(offset: int) -> None:
    """Attention depends on distances only, where angles are exact; f32 angles are 0.6 off here."""
    model = make_tiny_llama()
    ids, mask, positions = batch(300, 0)
    with attach_pages(model, exact_codecs(model)):
        near, _ = fed(model, ids, mask, positions, [300])
        far, _ = fed(model, ids, mask, positions + offset, [299, 1])
    assert (far - near).abs().max() <= SUMS * near.abs().max()
    if offset:
        stock, shifted = (
            model(ids, position_ids=p).logits for p in (positions, positions + offset)
        )
        assert (shifted - stock).abs().max() > 20 * (far - near).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_models(dtype: torch.dtype) -> None:
    """As near to the f32 model as the stock model in the same dtype, twice over."""
    model = make_tiny_llama()
    ids, mask, positions = batch(600, 37)
    attended = mask.bool()
    truth = model(ids, attention_mask=mask, position_ids=positions).logits[attended]
    model = model.to(dtype)
    stock = model(ids, attention_mask=mask, position_ids=positions).logits[attended]
    with attach_pages(model, exact_codecs(model, dtype=dtype)):
        logits, cache = fed(model, ids, mask, positions, [584, *[1] * 16])
    assert logits.dtype == dtype
    assert next(packed_layers(cache)).exact.keys.dtype == dtype
    misses, stock_misses = ((x.float() - truth).abs().max() for x in (logits[attended], stock))
    assert misses <= 2 * stock_misses


# What is refused, and what is left behind.


def refused(model: PreTrainedModel, words: str, *args: Any, **kwargs: Any) -> KVQError:
    """The error of a forward, after which the model and its next forward are as ever."""
    ids = torch.randint(3, 199, (1, 20), generator=torch.Generator().manual_seed(0))
    stock = model.eval()(ids).logits
    with attach(model, make_sidecar(model=model)):
        model.train(kwargs.pop("training", False))
        with pytest.raises(KVQError, match=words) as caught:
            model(*(args or (ids,)), **kwargs)
        model.eval()
        assert torch.isfinite(model(ids).logits).all()
    assert torch.equal(model(ids).logits, stock)
    return caught.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_mask": torch.ones(1, 1, 20, 20)}, r"\[1, 1, 20, 20\]"),
        ({"attention_mask": torch.ones(1, 19)}, r"\[1, 19\], expected \[1, 20\]"),
        ({"position_ids": torch.arange(20).flip(0)[None]}, "go back"),
        ({"position_ids": torch.arange(20)[None] - 3}, "from -3"),
        ({"output_attentions": True}, "attention weights are asked for"),
    ],
)
@torch.no_grad()
def test_forwards_that_are_refused(options: dict[str, Any], words: str) -> None:
    error = refused(make_tiny_llama(), words, **options)
    assert error.hint


def test_training_is_refused() -> None:
    refused(make_tiny_llama(), "training mode", training=True)


@torch.no_grad()
def test_padding_cannot_change_afterwards() -> None:
    model = make_tiny_llama()
    ids, mask, positions = batch(20, 3)
    with attach(model, make_sidecar()):
        _, cache = fed(model, ids, mask, positions, [20])
        more = torch.ones(2, 21)
        with pytest.raises(KVQError, match="differs from the one"):
            model(ids[:, :1], attention_mask=more, past_key_values=cache)
        more[0, :3] = 0
        model(ids[:, :1], attention_mask=more, past_key_values=cache)
        assert cache.tokens_held == [18, 21]


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_a_padded_batch_without_positions(padding: int) -> None:
    """The model counts slots then: the keys of a padded row lie further on, and so do queries."""
    model = make_tiny_llama()
    ids, mask, _ = batch(20, padding)
    stock = model(ids, attention_mask=mask).logits
    with attach(model, make_sidecar()):
        found = model(ids, attention_mask=mask).logits
    attended = mask.bool()
    assert (found - stock)[attended].abs().max() <= SUMS * stock[attended].abs().max()


@torch.no_grad()
def test_another_batch_on_the_same_cache_is_refused() -> None:
    model = make_tiny_llama()
    with attach(model, make_sidecar()):
        cache = model(torch.ones(2, 5, dtype=torch.int64)).past_key_values
        with pytest.raises(KVQError, match="holds 2 rows and got 3"):
            model(torch.ones(3, 1, dtype=torch.int64), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias is not honoured"),
        ({"cu_seq_lens_q": torch.zeros(1)}, "cu_seq_lens_q"),
        ({"is_causal": False}, "is_causal"),
        ({"head_mask": torch.zeros(1)}, "head_mask"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"sliding_window": 99}, "window of 99 tokens and the cache holds 100"),
    ],
)
def test_attention_options_that_are_not_honoured(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KVQError, match=words):
        attention_options(options, tokens=100, head_dim=16)


def test_attention_options_that_are() -> None:
    sinks = torch.zeros(4)
    found = attention_options(
        {
            "scaling": 0.5,
            "softcap": 30.0,
            "s_aux": sinks,
            "sliding_window": 100,
            "dropout": 0.0,
            "is_causal": True,
            "position_ids": torch.zeros(1, 1),
            "head_mask": None,
        },
        tokens=100,
        head_dim=16,
    )
    assert (found.scaling, found.softcap) == (0.5, 30.0)
    assert found.sink_logits is sinks
    assert attention_options({}, tokens=1, head_dim=16).scaling == 0.25


@torch.no_grad()
def test_attach_twice_and_again() -> None:
    model, sidecar = make_tiny_llama(), make_sidecar()
    ids = torch.randint(3, 300, (1, 300), generator=torch.Generator().manual_seed(0))
    stock = model(ids).logits
    for rule in ("runtime", "evaluation", "exact-prefill"):
        with (
            attach(model, sidecar),
            pytest.raises(KVQError, match="attached to this LlamaForCausalLM already"),
            attach(model, sidecar, rule=rule),
        ):
            pass
        assert torch.equal(model(ids).logits, stock)
    with attach(model, sidecar):
        first = model(ids).logits
    with attach(model, sidecar):
        assert torch.equal(model(ids).logits, first)


@torch.no_grad()
def test_nothing_is_left_behind_by_a_forward_that_fails() -> None:
    model = make_tiny_llama()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    ids = torch.randint(3, 300, (1, 20))
    stock = model(ids).logits

    class Broken(ExactPageCodec):
        def encode(self, keys: Tensor, values: Tensor, *, impl: str = "reference") -> Any:
            raise RuntimeError("in the middle of a page")

    codecs = {i: Broken(**vars(codec)) for i, codec in exact_codecs(model).items()}
    long = torch.randint(3, 300, (1, 300))
    with pytest.raises(RuntimeError, match="middle of a page"), attach_pages(model, codecs):
        model(long)
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert left == hooks
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_a_garbage_codebook_wrecks_the_logits() -> None:
    model, good = make_tiny_llama(), make_sidecar(4)
    ids = torch.randint(3, 300, (1, 1000), generator=torch.Generator().manual_seed(0))
    stock = model(ids).logits[:, 300:]

    def error(sidecar: Sidecar) -> float:
        with attach(model, sidecar):
            return float((model(ids).logits[:, 300:] - stock).square().mean())

    assert error(with_garbage_codebooks(good)) > 30 * error(good)


@pytest.mark.parametrize(
    ("title", "words"), [("SmolLM3", "without having rotated"), ("Phi-2", "8 ")]
)
@torch.no_grad()
def test_a_layer_that_does_not_rotate_what_was_learned_is_refused(title: str, words: str) -> None:
    """Codecs that were made as if every layer rotated all channels."""
    model = FAMILIES[title].make()
    family = FAMILIES[title]
    codecs = exact_codecs(model, family.rotary_channels)
    rotated = next(iter(exact_codecs(make_tiny_llama()).values())).rotary
    codecs[1].rotary = replace(codecs[1].rotary, channels=rotated.channels)
    with attach_pages(model, codecs), pytest.raises(UnsupportedModelError, match=words):
        model(torch.randint(3, 199, (1, 20)))
