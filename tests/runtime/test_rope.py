"""The seam sees what it claims to see, and leaves no trace."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime import rope
from kvq_runtime.rope import AttentionCall, AttentionTap, RotaryCall, tap_attention
from tiny_models import make_tiny_family, make_tiny_llama

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite"]


class Recorder(AttentionTap):
    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.forwards = 0

    def on_forward(self, arguments: Any) -> None:
        self.forwards += 1

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        self.keys[call.layer_idx] = call.key
        return super().on_rotary(call)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.values[call.layer_idx] = call.value
        return super().on_attention(call)


def projected(attention: torch.nn.Module, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, T, D]`` from the outputs of the module's own submodules."""
    D = attention.head_dim
    if "qkv_proj" in outputs:
        fused = outputs["qkv_proj"].unflatten(-1, (-1, D))
        key, value = fused[..., 4:6, :], fused[..., 6:8, :]
    else:
        key = outputs.get("k_norm", outputs["k_proj"])
        key = key.unflatten(-1, (-1, D)) if key.dim() == 3 else key
        value = outputs["v_proj"].unflatten(-1, (-1, D))
    if key.shape[1] != value.shape[1]:
        key = key.transpose(1, 2)
    return key.transpose(1, 2), value.transpose(1, 2)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_keys_are_taken_before_rope_and_after_k_norm(model_type: str) -> None:
    model = make_tiny_family(model_type)
    ids = torch.randint(3, 199, (2, 24))
    stock = model(ids).logits
    seen: dict[int, dict[str, Tensor]] = {}
    handles = []
    for index, module in rope.attention_modules(model).items():
        for name, child in module.named_children():
            store = seen.setdefault(index, {})
            handles.append(
                child.register_forward_hook(
                    lambda _m, _a, out, store=store, name=name: store.__setitem__(name, out)
                )
            )
    recorder = Recorder()
    with tap_attention(model, recorder):
        tapped = model(ids).logits
    assert torch.equal(tapped, stock)
    assert sorted(recorder.keys) == sorted(recorder.values) == [0, 1]
    assert recorder.forwards == 1
    for index, module in rope.attention_modules(model).items():
        key, value = projected(module, seen[index])
        assert torch.equal(recorder.keys[index], key)
        assert torch.equal(recorder.values[index], value)


@torch.no_grad()
def test_the_model_is_the_stock_model_again() -> None:
    model = make_tiny_llama()
    ids = torch.randint(3, 300, (1, 20))
    stock = model(ids).logits
    file = __import__(type(model).__module__, fromlist=["x"])
    before = (file.apply_rotary_pos_emb, model.config._attn_implementation)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    class Failing(AttentionTap):
        def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            raise RuntimeError("in the middle of a layer")

    with pytest.raises(RuntimeError, match="middle"), tap_attention(model, Failing()):
        model(ids)
    assert (file.apply_rotary_pos_emb, model.config._attn_implementation) == before
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert left == hooks
    assert torch.equal(model(ids).logits, stock)
    assert not [n for n in rope.AttentionInterface._global_mapping if n.startswith(rope.PREFIX)]


@torch.no_grad()
def test_another_model_of_the_same_file_is_not_tapped() -> None:
    tapped, bystander = make_tiny_llama(), make_tiny_llama(seed=1)
    ids = torch.randint(3, 300, (1, 20))
    stock = bystander(ids).logits
    recorder = Recorder()
    with tap_attention(tapped, recorder):
        assert torch.equal(bystander(ids).logits, stock)
    assert recorder.keys == {}
    assert recorder.values == {}


@torch.no_grad()
def test_two_models_of_one_file_are_tapped_apart() -> None:
    models = make_tiny_llama(), make_tiny_llama(seed=1)
    ids = torch.randint(3, 300, (1, 20))
    stock = [model(ids).logits for model in models]
    outer, inner = Recorder(), Recorder()
    with tap_attention(models[0], outer):
        with tap_attention(models[1], inner):
            assert torch.equal(models[0](ids).logits, stock[0])
            assert (sorted(outer.values), inner.values) == ([0, 1], {})
            assert torch.equal(models[1](ids).logits, stock[1])
        assert sorted(inner.values) == [0, 1]
        assert not torch.equal(inner.keys[0], outer.keys[0])
        assert torch.equal(models[0](ids).logits, stock[0])


@pytest.mark.parametrize("model_type", ["phi", "stablelm", "persimmon"])
def test_keys_of_which_a_part_bypasses_rope_are_refused(model_type: str) -> None:
    """Half of the channels never reach the rotary function: they would stay exact unseen."""
    model = make_tiny_family(model_type)
    with (
        tap_attention(model, AttentionTap()),
        pytest.raises(UnsupportedModelError, match="bypasses RoPE"),
    ):
        model(torch.randint(3, 199, (1, 8)))
    # The failure leaves nothing behind.
    model(torch.randint(3, 199, (1, 8)))


def test_a_rotary_function_of_one_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llama()
    file = sys.modules[type(model).__module__]
    monkeypatch.setattr(file, rope.ROTARY_FUNCTION, lambda x, cos, sin: x)
    with (
        pytest.raises(UnsupportedModelError, match="queries and keys together"),
        tap_attention(model, AttentionTap()),
    ):
        pass


def test_a_second_tap_is_refused() -> None:
    model = make_tiny_llama()
    with (
        tap_attention(model, AttentionTap()),
        pytest.raises(KVQError, match="attached to this LlamaForCausalLM already"),
        tap_attention(model, AttentionTap()),
    ):
        pass


def test_attention_that_is_not_understood_is_refused() -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32
    )
    model = AutoModelForCausalLM.from_config(config)
    with (
        pytest.raises(UnsupportedModelError, match=r"rotates its keys|no attention layers"),
        tap_attention(model, AttentionTap()),
    ):
        pass
