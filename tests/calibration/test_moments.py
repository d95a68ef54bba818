"""Second moments of gradients: against plain autograd, and what feedback is made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_calibration.moments import (
    DAMPING,
    FAR_SHARE,
    GradientMoments,
    at_normalised,
    fit_feedback,
    target_weights,
)
from kvq_calibration.pipeline import calibrate
from kvq_formats.config import KVQConfig
from kvq_formats.feedback import Feedback
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from projections import projected

SINKS = 3


def outer_products(gradients: Tensor) -> Tensor:
    """Sum of ``g g^T`` over tokens of ``[T, H, D]``, one by one, f64 ``[H, D, D]``."""
    _, H, D = gradients.shape
    total = torch.zeros(H, D, D, dtype=torch.float64)
    for token in gradients.double():
        for head in range(H):
            total[head] += torch.outer(token[head], token[head])
    return total


def moments_of(*batches: Tensor) -> GradientMoments:
    moments = GradientMoments()
    for batch in batches:
        moments.add(batch)
    return moments


def random_gradients(T: int, H: int, D: int, *, seed: int = 0) -> Tensor:
    """Of channels that hang together and weigh unlike."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(H, D, D, generator=generator)
    return torch.einsum("thd,hde->the", torch.randn(T, H, D, generator=generator), mixing)


def test_moments_are_sums_of_outer_products_over_batches() -> None:
    gradients = random_gradients(23, 3, 5)
    expected = outer_products(gradients)
    for batches in ([gradients], list(gradients.split(7))):
        total = moments_of(*batches).total
        assert total is not None
        assert total.dtype == torch.float64
        assert total.device.type == "cpu"
        # f32 sums of at most 23 products.
        assert (total - expected).abs().max() <= 23 * 2.0**-23 * expected.abs().max()


def test_batches_add_up_in_f64() -> None:
    one = torch.ones(1, 1, 1)
    moments = moments_of(4096 * one, *[one] * 3)
    assert moments.total is not None
    # 2**24 + 3 is no f32.
    assert moments.total.item() == 2**24 + 3


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6))
def test_they_tell_the_loss_of_any_error(seed: int, tokens: int, D: int) -> None:
    """``e^T M e`` is the sum of ``(g . e)**2``."""
    gradients = random_gradients(tokens, 2, D, seed=seed)
    error = torch.randn(2, D, generator=torch.Generator().manual_seed(seed + 1)).double()
    total = moments_of(gradients).total
    assert total is not None
    found = torch.einsum("hd,hde,he->h", error, total, error)
    expected = (gradients.double() * error).sum(-1).square().sum(0)
    size = (gradients.double().abs() * error.abs()).sum(-1).square().sum(0)
    assert ((found - expected).abs() <= 2.0**-20 * size).all()


def feedback_of(gradients: Tensor, half_range: Tensor | None = None) -> Feedback:
    total = moments_of(gradients).total
    assert total is not None
    return fit_feedback(total if half_range is None else at_normalised(total, half_range))


@pytest.mark.parametrize("with_range", [False, True])
def test_feedback_is_between_normalised_numbers(with_range: bool) -> None:
    """Of ``x = half_range * z`` the gradient at z is ``half_range`` times that at x."""
    gradients = random_gradients(200, 2, 16)
    half_range = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) * 8 + 0.1
    at_z = gradients * half_range if with_range else gradients
    expected = Feedback.fit(outer_products(at_z), damping=DAMPING)
    found = feedback_of(gradients, half_range if with_range else None)
    assert torch.equal(found.order, expected.order)
    # The last bit of an f16 and the rounding of f32 sums.
    assert (found.gains.float() - expected.gains.float()).abs().max() <= 2e-3
    assert expected.gains.abs().max() > 0.5


def test_a_factor_that_all_numbers_share_makes_no_difference() -> None:
    gradients = random_gradients(100, 2, 8)
    alone, scaled = feedback_of(gradients), feedback_of(64 * gradients)
    assert torch.equal(alone.order, scaled.order)
    assert torch.equal(alone.gains, scaled.gains)


def test_far_gradients_weigh_a_share_whatever_their_size() -> None:
    gradients, far = random_gradients(50, 2, 4), random_gradients(9, 2, 4, seed=1)
    total, rare = outer_products(gradients), outer_products(far)
    as_large = rare * (total.diagonal(dim1=1, dim2=2).sum() / rare.diagonal(dim1=1, dim2=2).sum())
    expected = total + FAR_SHARE * as_large
    for size in (1.0, 2.0**-20):
        found = moments_of(gradients).with_far(moments_of(size * far))
        assert (found - expected).abs().max() <= 50 * 2.0**-23 * expected.abs().max()


@pytest.mark.parametrize("far", [None, torch.zeros(3, 2, 4)])
def test_without_far_gradients_moments_are_as_they_are(far: Tensor | None) -> None:
    gradients = moments_of(random_gradients(50, 2, 4))
    found = gradients.with_far(GradientMoments() if far is None else moments_of(far))
    assert gradients.total is not None
    assert torch.equal(found, gradients.total)


def test_targets_weigh_what_the_moment_says_of_their_errors() -> None:
    """``e^T M e`` of errors that lead from any targets is the sum of ``S (target - decoded)^2``."""
    total = moments_of(random_gradients(300, 2, 6)).total
    assert total is not None
    feedback = fit_feedback(total)
    weights = target_weights(total)
    damped = total + torch.diag_embed(
        DAMPING * total.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(2, 6)
    )
    misses = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).double()
    expected = torch.einsum("hd,hd->h", weights, misses.square())
    for head in range(2):
        # error_i = miss_i - what came before it gives: the target is x + sum of error * gain.
        gains = torch.zeros(6, 6, dtype=torch.float64)
        row, column = torch.triu_indices(6, 6, offset=1)
        gains[row, column] = feedback.gains[head].double()
        error = torch.zeros(6, dtype=torch.float64)
        for i, channel in enumerate(feedback.order[head].tolist()):
            error[i] = misses[head, channel] - error[:i] @ gains[:i, i]
        by_channel = torch.zeros_like(error).scatter(0, feedback.order[head], error)
        loss = by_channel @ damped[head] @ by_channel
        # Gains are f16.
        assert abs(loss - expected[head]) <= 2.0**-8 * expected[head]


def sidecar_of(model: LlamaForCausalLM, windows: Tensor, config: KVQConfig) -> Sidecar:
    fingerprint = Fingerprint.from_config(model.config.to_dict())
    num_samples, seq_len = windows.shape
    return calibrate(
        model,
        windows,
        config,
        base_model=BaseModelRecord(id="tiny", revision=None, fingerprint=fingerprint),
        calibration=CalibrationRecord(
            dataset="random", revision=None, num_samples=num_samples, seq_len=seq_len, seed=0,
            token_sha256="0" * 64,
        ),
        batch_size=2,
    )  # fmt: skip


def test_calibration_feeds_back_by_the_gradients_of_the_loss(tiny_llama: LlamaForCausalLM) -> None:
    """Of tokens after the sinks of every window; keys by their half-range, values as they are."""
    windows = torch.randint(3, 300, (3, 50), generator=torch.Generator().manual_seed(2))
    config = KVQConfig(key_bits=3, value_bits=3, sink_tokens=SINKS)
    sidecar = sidecar_of(tiny_llama, windows, config)
    for index, layer in projected(tiny_llama, windows).items():
        key, value = sidecar.layers[index].key, sidecar.layers[index].value
        at_keys, at_values = (
            gradient[:, SINKS:].flatten(0, 1)
            for gradient in (layer.key_gradient, layer.value_gradient)
        )
        for found, gradients in (
            (key.feedback, at_keys * key.half_range),
            (value.feedback, at_values),
        ):
            expected = Feedback.fit(outer_products(gradients), damping=DAMPING)
            assert found is not None
            assert torch.equal(found.order, expected.order)
            # Gradients differ by some hundred f32 roundings, gains are f16 near one.
            assert (found.gains.float() - expected.gains.float()).abs().max() <= 5e-3


@pytest.mark.parametrize("options", [{"feedback": False}, {"sensitivity": "none"}])
def test_without_feedback_or_gradients_nothing_is_fed_back(
    tiny_llama: LlamaForCausalLM, options: dict
) -> None:
    windows = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    sidecar = sidecar_of(tiny_llama, windows, KVQConfig(key_bits=2, value_bits=2, **options))
    for layer in sidecar.layers.values():
        assert layer.key.feedback is None
        assert layer.value.feedback is None
