"""The loss by rows: gradients of keys and values to the last bit, in less memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from kvq_calibration import sensitivity, token_loss
from kvq_calibration.capture import KeyValueTap
from kvq_calibration.sensitivity import LossScale, activation_gradients, backward, squared_gradients
from kvq_calibration.token_loss import loss_by_rows
from kvq_runtime.rope import tap_attention
from peak_bytes import PeakBytes
from tiny_models import make_tiny_family, make_tiny_llama

# What families do to their logits: nothing, a soft-cap, a divisor, a factor.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 512, "head_dim": 16, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
}

IDS = torch.randint(3, 190, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk, which does not divide the 66 there are."""
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", 199 * 7)


def squares(model: PreTrainedModel, ids: Tensor = IDS) -> list[Tensor]:
    tap, scale = KeyValueTap(layers=(0, 1)), LossScale(model.dtype)
    with tap_attention(model, tap), activation_gradients(model):
        backward(model, tap, ids, scale)
        return [x for layer in (0, 1) for x in squared_gradients(tap, layer, scale)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers_loss(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_family(family, **FAMILIES[family]).to(dtype)
    found = squares(model)
    monkeypatch.setattr(sensitivity, "loss_by_rows", lambda *_: nullcontext())
    expected = squares(model)
    assert all(float(x.max()) > 0 for x in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_loss_is_the_mean_over_predicted_tokens() -> None:
    model = make_tiny_llama()
    expected = model(input_ids=IDS, labels=IDS).loss
    with loss_by_rows(model, 1.0):
        found = model(input_ids=IDS, labels=IDS).loss
    # Sums of 64 fp32 numbers in another order.
    assert found.item() == pytest.approx(expected.item(), rel=64 * 2.0**-24)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_any_factor_may_be_asked_for(factor: float) -> None:
    logits = torch.randn(2, 5, 11, dtype=torch.float64).float().requires_grad_(True)
    labels = torch.randint(0, 11, (2, 5))
    model = make_tiny_llama()
    (expected,) = torch.autograd.grad(ForCausalLMLoss(logits, labels, 11) * factor, logits)
    with loss_by_rows(model, 4.0):
        loss = model.loss_function(logits, labels, 11)
        (found,) = torch.autograd.grad(loss * factor, logits)
    # Four roundings: the factor, its quotient, and the product with it, twice.
    assert torch.allclose(found, expected, rtol=4 * 2.0**-24, atol=0)


def test_other_losses_are_left_alone() -> None:
    model = make_tiny_llama()
    own = lambda **_: torch.zeros(())  # noqa: E731
    model.loss_function = own
    with loss_by_rows(model, 1.0):
        assert model.loss_function is own
    assert model.loss_function is own
    model = make_tiny_llama()
    logits, labels = torch.randn(1, 4, 11), torch.randint(0, 11, (1, 4))
    with loss_by_rows(model, 1.0):
        # Options that are not ours to know.
        found = model.loss_function(logits, labels, 11, num_items_in_batch=2)
    assert torch.equal(found, ForCausalLMLoss(logits, labels, 11, num_items_in_batch=2))


def test_the_models_loss_is_back() -> None:
    model = make_tiny_llama()
    before = dict(vars(model))
    with pytest.raises(KeyError), loss_by_rows(model, 1.0):
        raise KeyError
    assert vars(model) == before
    assert model.loss_function is ForCausalLMLoss


def peak_of(model: PreTrainedModel) -> int:
    ids = torch.randint(3, 190, (1, 256))
    with PeakBytes() as measured:
        squares(model, ids)
    return measured.peak


def test_logits_are_what_is_left_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and their gradient in bf16: 4 bytes a number, and not 12 beside the bf16 ones."""
    model = make_tiny_llama(vocab_size=8192).to(torch.bfloat16)
    numbers = 256 * 8192
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", numbers // 64)
    found = peak_of(model)
    monkeypatch.setattr(sensitivity, "loss_by_rows", lambda *_: nullcontext())
    stock = peak_of(model)
    assert stock > 12 * numbers
    assert found < 5 * numbers
