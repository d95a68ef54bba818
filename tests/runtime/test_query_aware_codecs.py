"""Codecs that see queries: what they are shown, row by row, and where their answers go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.evaluation_rule import QueryAwareCodec, attach_codec
from kvq_runtime.rope import AttentionCall, AttentionTap, tap_attention
from kvq_runtime.rotary_channels import key_before_rope

EPS = torch.finfo(torch.float32).eps
SINKS = 2


@dataclass
class Plain:
    """Decodes to ``key_scale`` and ``value_scale`` times the truth."""

    key_scale: float = 1.0
    value_scale: float = 1.0
    sink_tokens: int = SINKS
    recent_tokens: int = 0
    rotated_keys: bool = False
    layers: tuple[int, ...] = (0, 1)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        return keys * self.key_scale

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        return values * self.value_scale


@dataclass
class Aware(Plain):
    """The same both at once; keeps what it was shown, by layer."""

    shown: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        raise AssertionError("keys alone")

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        raise AssertionError("values alone")

    def decoded_pair(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.shown.append((layer_idx, queries.clone(), keys.clone(), values.clone()))
        return keys * self.key_scale, values * self.value_scale


class Seen(AttentionTap):
    """What each layer of the stock model attends with, ``[B, heads, T, D]``."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        before = key_before_rope(call).key
        self.calls[call.layer_idx] = (call.query, before, call.key, call.value)
        return super().on_attention(call)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(3))


def padded(ids: Tensor, padding: int) -> dict[str, Tensor]:
    """Arguments of a forward whose first row is padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def test_who_sees_queries() -> None:
    assert isinstance(Aware(), QueryAwareCodec)
    assert not isinstance(Plain(), QueryAwareCodec)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_a_codec_is_shown_each_row_after_its_sinks(
    tiny_llama: LlamaForCausalLM, ids: Tensor, padding: int, rotated: bool
) -> None:
    arguments = padded(ids, padding)
    codec, seen = Aware(rotated_keys=rotated), Seen()
    with tap_attention(tiny_llama, seen):
        tiny_llama(**arguments)
    with attach_codec(tiny_llama, codec):
        tiny_llama(**arguments)
    # Layer by layer, row by row.
    assert [layer for layer, *_ in codec.shown] == [0, 0, 1, 1]
    firsts = [padding + SINKS, SINKS] * 2
    rows = [0, 1] * 2
    for (layer, queries, keys, values), row, first in zip(codec.shown, rows, firsts, strict=True):
        query, before, after, value = (x[row, :, first:] for x in seen.calls[layer])
        # An exact codec changes nothing on the way to the second layer.
        assert torch.equal(queries, query)
        assert torch.equal(keys, after if rotated else before)
        assert torch.equal(values, value)


@pytest.mark.parametrize("rule", ["evaluation", "runtime"])
@pytest.mark.parametrize("rotated", [False, True])
@torch.no_grad()
def test_its_answers_are_attended_over_as_those_of_others(
    tiny_llama: LlamaForCausalLM, rotated: bool, rule: Literal["evaluation", "runtime"]
) -> None:
    ids = torch.randint(
        3, 300, (2, SINKS + PAGE_TOKENS + 9), generator=torch.Generator().manual_seed(3)
    )
    arguments = padded(ids, 3)
    # Keys and values by factors of their own, so that neither is taken for the other.
    options = {"key_scale": 0.5, "value_scale": -2.0, "recent_tokens": 2, "rotated_keys": rotated}
    with attach_codec(tiny_llama, Aware(**options), rule=rule):
        found = tiny_llama(**arguments).logits
    with attach_codec(tiny_llama, Plain(**options), rule=rule):
        expected = tiny_llama(**arguments).logits
    stock = tiny_llama(**arguments).logits
    attended = arguments["attention_mask"].bool()
    assert torch.equal(found[attended], expected[attended])
    assert (found - stock)[:, -4:].abs().amax(-1).min() > 0.01


@torch.no_grad()
def test_a_row_of_sinks_is_shown_to_nobody(tiny_llama: LlamaForCausalLM, ids: Tensor) -> None:
    arguments = padded(ids, ids.shape[1] - SINKS)
    codec = Aware(key_scale=0.0, value_scale=0.0)
    stock = tiny_llama(**arguments).logits
    with attach_codec(tiny_llama, codec):
        found = tiny_llama(**arguments).logits
    assert [queries.shape[1] for _, queries, _, _ in codec.shown] == [ids.shape[1] - SINKS] * 2
    assert torch.equal(found[0, -SINKS:], stock[0, -SINKS:])
    assert (found[1, SINKS:] - stock[1, SINKS:]).abs().amax(-1).min() > 0.01


@torch.no_grad()
def test_numbers_are_shown_in_fp32_and_attended_in_the_models_dtype(
    tiny_llama: LlamaForCausalLM, ids: Tensor
) -> None:
    model = tiny_llama.bfloat16()
    codec, stock = Aware(), model(ids).logits
    with attach_codec(model, codec):
        found = model(ids).logits
    for _, *tensors in codec.shown:
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert torch.equal(found, stock)


@torch.no_grad()
def test_layers_that_are_not_quantized_are_not_shown(
    tiny_llama: LlamaForCausalLM, ids: Tensor
) -> None:
    codec = Aware(layers=(1,))
    with attach_codec(tiny_llama, codec):
        tiny_llama(ids)
    assert [layer for layer, *_ in codec.shown] == [1, 1]
