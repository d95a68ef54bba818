"""What a query sees under the evaluation rule: decoded everything, except sinks and its band."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime.evaluation_rule import attach_codec, partly_exact_attention
from tiny_models import make_tiny_llama

VOCABULARY = 300
EPS = torch.finfo(torch.float32).eps


class Codec:
    """Decodes to ``scale`` times the truth, and keeps the shapes that it was shown."""

    rotated_keys = False

    def __init__(self, *, scale: float = 1.0, sink_tokens: int = 1, recent_tokens: int = 0) -> None:
        self.layers = (0, 1)
        self.scale = scale
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.shown: list[tuple[int, ...]] = []

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        self.shown.append(tuple(keys.shape))
        return keys * self.scale

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        return values * self.scale


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


def logits(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("rotated", [False, True])
def test_an_exact_codec_changes_no_bit(
    model: LlamaForCausalLM, ids: Tensor, implementation: str, rotated: bool
) -> None:
    model.set_attn_implementation(implementation)
    codec = Codec()
    codec.rotated_keys = rotated
    stock = logits(model, ids)
    with attach_codec(model, codec):
        assert torch.equal(logits(model, ids), stock)
    assert torch.equal(logits(model, ids), stock)


def test_keys_and_values_that_decode_to_nothing_are_seen(
    model: LlamaForCausalLM, ids: Tensor
) -> None:
    stock = logits(model, ids)
    with attach_codec(model, Codec(scale=0.0, sink_tokens=2)):
        wrecked = logits(model, ids)
    # Rows of sinks see only sinks: untouched. The first other query sees its own decoded key.
    assert torch.equal(wrecked[:, :2], stock[:, :2])
    assert (wrecked[:, 2:] - stock[:, 2:]).abs().amax(-1).min() > 0.01


def test_a_band_keeps_the_newest_tokens_exact(model: LlamaForCausalLM, ids: Tensor) -> None:
    stock = logits(model, ids)
    band = 8
    with attach_codec(model, Codec(scale=0.0, sink_tokens=0, recent_tokens=band)):
        banded = logits(model, ids)
    # fp32 sums over at most 64 numbers in another order, four in a row in each of two layers.
    bound = 64 * EPS * stock.abs().max() * 8
    # The first `band` queries see nothing that is older than the band.
    assert (banded[:, :band] - stock[:, :band]).abs().max() <= bound
    assert (banded[:, band:] - stock[:, band:]).abs().amax(-1).min() > 0.01
    with attach_codec(model, Codec(scale=0.0, sink_tokens=0, recent_tokens=ids.shape[1])):
        assert (logits(model, ids) - stock).abs().max() <= bound


@pytest.mark.parametrize("recent_tokens", [0, 5])
@pytest.mark.parametrize("padding", [1, 7, 38])
def test_padding_changes_nothing_for_a_row(
    model: LlamaForCausalLM, ids: Tensor, recent_tokens: int, padding: int
) -> None:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    codec = Codec(scale=0.5, sink_tokens=2, recent_tokens=recent_tokens)
    with torch.no_grad(), attach_codec(model, codec):
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(ids[:1, padding:]).logits
    # As above.
    bound = 64 * EPS * alone.abs().max() * 8
    assert (batch[0, padding:] - alone[0]).abs().max() <= bound
    # Padding and sinks are shown to no codec.
    kept = ids.shape[1] - padding - 2
    assert ((2, kept, 16) in codec.shown) == (kept > 0)
    assert (2, ids.shape[1] - 2, 16) in codec.shown


def test_layers_that_are_not_quantized_stay_exact(model: LlamaForCausalLM, ids: Tensor) -> None:
    codec = Codec(scale=0.0)
    codec.layers = ()
    stock = logits(model, ids)
    with attach_codec(model, codec):
        assert torch.equal(logits(model, ids), stock)


def test_a_cache_that_holds_tokens_is_refused(model: LlamaForCausalLM, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), attach_codec(model, Codec()):
        model(ids, past_key_values=cache)
        with pytest.raises(KVQError, match="already holds 40 tokens"):
            model(ids[:, :1], past_key_values=cache)


def test_custom_masks_are_refused(model: LlamaForCausalLM, ids: Tensor) -> None:
    mask = torch.ones(2, 1, 40, 40)
    with attach_codec(model, Codec()), pytest.raises(KVQError, match="4 dimensions"):
        logits(model, ids, mask)


def banded(q: Tensor, k: Tensor, v: Tensor, *, band: int, options: dict[str, object]) -> Tensor:
    """Attention over pairs that are the same, whichever is read."""
    order = torch.arange(q.shape[2])[None]
    return partly_exact_attention(
        q, (k, v), (k, v), exact_until=order + band - 1, order=order, mask=None, options=options
    )


class QueryAware(Codec):
    """Decodes both at once, from the queries that it was shown."""

    def decoded_pair(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.shown.append(tuple(queries.shape))
        return keys * self.scale, values * self.scale


@pytest.mark.parametrize("rotated", [False, True])
def test_a_codec_that_sees_queries_decodes_both(
    model: LlamaForCausalLM, ids: Tensor, rotated: bool
) -> None:
    both, apart = QueryAware(scale=0.5, sink_tokens=2), Codec(scale=0.5, sink_tokens=2)
    both.rotated_keys = apart.rotated_keys = rotated
    with attach_codec(model, both):
        found = logits(model, ids)
    with attach_codec(model, apart):
        assert torch.equal(found, logits(model, ids))
    assert both.shown == [(4, 38, 16)] * 4


@pytest.mark.parametrize("recent_tokens", [0, 3])
def test_under_the_runtime_rule_a_querys_own_page_is_exact(
    model: LlamaForCausalLM, recent_tokens: int
) -> None:
    sinks = 2
    ids = torch.randint(3, VOCABULARY, (1, 262), generator=torch.Generator().manual_seed(4))
    stock = logits(model, ids)
    codec = Codec(scale=0.0, sink_tokens=sinks, recent_tokens=recent_tokens)
    with attach_codec(model, codec, rule="runtime"):
        found = logits(model, ids)
    # The first page ends with token sinks + 255, and is exact for the recent tokens behind it.
    first = sinks + 256 + recent_tokens
    bound = 512 * EPS * stock.abs().max() * 8
    assert (found[:, :first] - stock[:, :first]).abs().max() <= bound
    assert (found[:, first:] - stock[:, first:]).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize(
    ("option", "value"), [("s_aux", torch.ones(4)), ("sliding_window", 4), ("dropout", 0.1)]
)
def test_a_band_refuses_what_it_does_not_honour(option: str, value: object) -> None:
    q, kv = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(UnsupportedModelError, match=option):
        banded(q, kv, kv, band=2, options={option: value})


def test_a_window_that_hides_nothing_is_no_matter() -> None:
    q, kv = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    found, expected = (
        banded(q, kv, kv, band=2, options=options)
        for options in ({"sliding_window": 8, "dropout": 0.0}, {})
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_banded_attention_is_attention(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 300, 16, generator=generator)
    k, v = (torch.randn(1, 2, 300, 16, generator=generator) for _ in range(2))
    options = {"scaling": 0.3, "softcap": softcap}
    found = banded(q, k, v, band=7, options=options)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    # Sums of 16 products, then of at most 300 weights that add up to one.
    bound = 300 * EPS * v.abs().max()
    assert (found - expected).abs().max() <= bound
