"""Squared gradients against autograd on the plain model, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from families import FAMILIES
from kvq_calibration.capture import KeyValueTap
from kvq_calibration.sensitivity import (
    LossScale,
    activation_gradients,
    backward,
    squared_gradients,
)
from kvq_formats.errors import CalibrationError
from kvq_runtime.rope import attention_modules, tap_attention
from tiny_models import make_tiny_llama


def squared_by_hooks(model: torch.nn.Module, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Gradients at the outputs of k_proj and v_proj, without taps or recomputation."""
    outputs: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, attention in attention_modules(model).items():
        for name in ("k_proj", "v_proj"):

            def keep(
                _m: object, _a: object, out: Tensor, key: tuple[int, str] = (index, name)
            ) -> None:
                out.retain_grad()
                outputs[key] = out

            handles.append(getattr(attention, name).register_forward_hook(keep))
    loss = model(input_ids=ids, labels=ids).loss
    (loss * ids[:, 1:].numel()).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 16)).transpose(1, 2).square()

    return {
        index: (heads(outputs[index, "k_proj"].grad), heads(outputs[index, "v_proj"].grad))
        for index in attention_modules(model)
    }


def squares(
    model: torch.nn.Module, tap: KeyValueTap, ids: Tensor, scale: LossScale
) -> dict[int, tuple[Tensor, Tensor]]:
    backward(model, tap, ids, scale)
    return {layer: squared_gradients(tap, layer, scale) for layer in tap.layers}


@pytest.mark.parametrize("title", ["Phi-2", "StableLM", "SmolLM3", "Qwen2 and Qwen2.5"])
def test_of_keys_that_are_rotated_in_part_or_not_at_all(title: str) -> None:
    """The gradient of a whole key, put together from that of its parts."""
    model = FAMILIES[title].make()
    ids = torch.randint(3, 190, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = squared_by_hooks(model, ids)
    tap = KeyValueTap(layers=(0, 1))
    scale = LossScale(torch.float32)
    with tap_attention(model, tap), activation_gradients(model):
        found = squares(model, tap, ids, scale)
    for layer, pair in expected.items():
        for ours, theirs in zip(found[layer], pair, strict=True):
            # As below.
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.max()


def test_squared_gradients_are_those_of_the_loss() -> None:
    model = make_tiny_llama()
    ids = torch.randint(3, 300, (2, 30))
    expected = squared_by_hooks(model, ids)
    tap = KeyValueTap(layers=(0, 1))
    with tap_attention(model, tap), activation_gradients(model):
        found = squares(model, tap, ids, LossScale(torch.float32))
    for layer in (0, 1):
        for ours, theirs in zip(found[layer], expected[layer], strict=True):
            assert theirs.max() > 0
            # Same graph, recomputed: rounding of a few hundred fp32 operations, squared.
            bound = 1e-4 * theirs.max()
            assert (ours - theirs).abs().max() <= bound


def test_the_model_is_left_as_it_was() -> None:
    model = make_tiny_llama()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    attributes = set(vars(model))
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    weights = [p.clone() for p in model.parameters()]
    tap = KeyValueTap(layers=(0, 1))
    with tap_attention(model, tap), activation_gradients(model):
        backward(model, tap, torch.randint(3, 300, (1, 20)), LossScale(torch.float32))
        assert not any(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert set(vars(model)) == attributes


# transformers 5.23 renamed what this test calls; earlier ones know these names only.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_caller_that_checkpoints_and_wants_no_gradients() -> None:
    model = make_tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    hooks = list(model.model.embed_tokens._forward_hooks.values())
    assert hooks
    tap = KeyValueTap(layers=(0, 1))
    with torch.no_grad(), tap_attention(model, tap), activation_gradients(model):
        found = squares(model, tap, torch.randint(3, 300, (1, 20)), LossScale(torch.float32))
    assert all(f.max() > 0 for pair in found.values() for f in pair)
    assert model.is_gradient_checkpointing
    after = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    assert after == functions
    # What transformers hooked to the embeddings for the caller, and goes when the caller says so.
    assert list(model.model.embed_tokens._forward_hooks.values()) == hooks
    model.disable_input_require_grads()
    assert not model.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_same_picture(dtype: torch.dtype) -> None:
    model = make_tiny_llama()
    ids = torch.randint(3, 300, (1, 40))
    expected = squared_by_hooks(model, ids)
    model.to(dtype)
    tap = KeyValueTap(layers=(0, 1))
    with tap_attention(model, tap), activation_gradients(model):
        found = squares(model, tap, ids, LossScale(dtype))
    for layer in (0, 1):
        for ours, theirs in zip(found[layer], expected[layer], strict=True):
            assert ours.dtype == torch.float32
            assert torch.isfinite(ours).all()
            pair = torch.stack([ours.flatten(), theirs.flatten()]).double()
            assert torch.corrcoef(pair)[0, 1] > 0.9


def test_an_fp16_overflow_lowers_the_scale() -> None:
    model = make_tiny_llama().half()
    ids = torch.randint(3, 300, (1, 20))
    scale = LossScale(torch.float16)
    scale.value = 2.0**40
    tap = KeyValueTap(layers=(0, 1))
    with tap_attention(model, tap), activation_gradients(model):
        found = squares(model, tap, ids, scale)
    assert scale.value < 2.0**40
    assert all(torch.isfinite(f).all() and f.max() > 0 for pair in found.values() for f in pair)


def test_gradients_that_are_never_finite_are_an_error() -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = torch.nan
    tap = KeyValueTap(layers=(0, 1))
    with (
        tap_attention(model, tap),
        activation_gradients(model),
        pytest.raises(CalibrationError, match="NaN or infinite"),
    ):
        backward(model, tap, torch.randint(3, 300, (1, 20)), LossScale(torch.float32))
