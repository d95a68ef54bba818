"""Gradients through later pages, against autograd on the runtime rule itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES
from kvq_calibration.far_gradients import FarGradientTap, has_far_queries
from kvq_calibration.sensitivity import LossScale, activation_gradients, backward, far_gradients
from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.evaluation_rule import attach_codec
from kvq_runtime.models import quantized_layers
from kvq_runtime.rope import tap_attention
from tiny_models import make_tiny_llama

SINKS = 3


class Moved:
    """A cache that decodes to its keys and values and something that a gradient can be taken at."""

    rotated_keys = False
    sink_tokens = SINKS
    recent_tokens = 0

    def __init__(self, layers: tuple[int, ...], shape: tuple[int, int, int]) -> None:
        self.layers = layers
        self.key, self.value = (
            {layer: torch.zeros(shape, requires_grad=True) for layer in layers} for _ in range(2)
        )

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        return keys + self.key[layer_idx]

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        return values + self.value[layer_idx]


def by_the_rule(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Gradients at what queries of later pages read, f32 ``[1, H, T, D]``, 0 in the sinks."""
    config = model.config
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    codec = Moved(quantized_layers(config), (config.num_key_value_heads, ids.shape[1] - SINKS, D))
    with attach_codec(model, codec, rule="runtime"), torch.enable_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)
        loss.backward()
    model.zero_grad()

    def padded(moved: Tensor) -> Tensor:
        assert moved.grad is not None
        return torch.nn.functional.pad(moved.grad, (0, 0, SINKS, 0))[None]

    return {layer: (padded(codec.key[layer]), padded(codec.value[layer])) for layer in codec.layers}


def by_the_tap(
    model: PreTrainedModel, ids: Tensor, *, recomputed: bool = True
) -> dict[int, tuple[Tensor, Tensor] | None]:
    layers = quantized_layers(model.config)
    tap = FarGradientTap(layers=layers, recomputed=recomputed, sink_tokens=SINKS)
    scale = LossScale(torch.float32)
    with tap_attention(model, tap), activation_gradients(model):
        backward(model, tap, ids, scale)
        found = {layer: far_gradients(tap, layer, scale) for layer in layers}
    assert not tap._attention
    assert not tap.far
    return found


def random_ids(tokens: int, *, rows: int = 1) -> Tensor:
    return torch.randint(3, 190, (rows, tokens), generator=torch.Generator().manual_seed(5))


def assert_same(
    found: dict[int, tuple[Tensor, Tensor] | None], model: PreTrainedModel, ids: Tensor
):
    expected = by_the_rule(model, ids)
    assert set(found) == set(expected)
    for layer, pair in expected.items():
        ours = found[layer]
        assert ours is not None
        for far, theirs in zip(ours, pair, strict=True):
            assert theirs.abs().max() > 0
            # A thousand f32 roundings, of sums whose terms are as large as the largest result.
            assert (far - theirs).abs().max() <= 1000 * 2.0**-24 * theirs.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tokens", [SINKS + PAGE_TOKENS + 2, 2 * PAGE_TOKENS + 40])
def test_they_are_those_of_what_decoding_reads(attention: str, tokens: int) -> None:
    model = make_tiny_llama()
    model.set_attn_implementation(attention)
    ids = random_ids(tokens)
    assert_same(by_the_tap(model, ids), model, ids)


@pytest.mark.parametrize("title", ["Phi-2", "SmolLM3", "Gemma 2", "Qwen3"])
def test_whatever_is_rotated_and_capped(title: str) -> None:
    model = FAMILIES[title].make()
    ids = random_ids(SINKS + 2 * PAGE_TOKENS + 9)
    assert_same(by_the_tap(model, ids), model, ids)


def test_of_layers_that_are_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llama()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    ids = random_ids(2 * PAGE_TOKENS)
    assert_same(by_the_tap(model, ids, recomputed=False), model, ids)


def test_sinks_that_are_learned_take_part() -> None:
    """The runtime rule's reference refuses them; the model's own attention has them."""
    model = FAMILIES["gpt-oss"].make()
    for pair in by_the_tap(model, random_ids(2 * PAGE_TOKENS)).values():
        assert pair is not None
        assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in pair)


def test_nothing_comes_from_the_own_page() -> None:
    ids = random_ids(SINKS + 2 * PAGE_TOKENS + 5, rows=2)
    for pair in by_the_tap(make_tiny_llama(), ids).values():
        assert pair is not None
        for far in pair:
            assert far.shape[:3] == (2, 2, ids.shape[1])
            assert far[:, :, :SINKS].abs().max() == 0
            assert far[:, :, SINKS + 2 * PAGE_TOKENS :].abs().max() == 0
            # The last token's query reads all of the second page.
            assert (far[:, :, SINKS : SINKS + 2 * PAGE_TOKENS].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("tokens", [20, SINKS + PAGE_TOKENS])
def test_windows_of_one_page_have_none(tokens: int) -> None:
    assert not has_far_queries(tokens, sink_tokens=SINKS)
    assert set(by_the_tap(make_tiny_llama(), random_ids(tokens)).values()) == {None}
