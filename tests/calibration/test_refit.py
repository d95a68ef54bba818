"""Codebooks of targets lower the expected loss, shifts keep the means of channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvq_calibration.moments import GradientMoments, fit_feedback
from kvq_calibration.refit import refit_keys, refit_values
from kvq_calibration.token_sample import TokenSample
from kvq_formats import pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import KeyParameters, ValueParameters

H, D, TOKENS = 2, 16, 600


def correlated(tokens: int, *, seed: int) -> Tensor:
    """Gradients of channels that hang together, f32 ``[T, H, D]``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(H, D, 3, generator=generator)
    few = torch.einsum("thk,hdk->thd", torch.randn(tokens, H, 3, generator=generator), mixing)
    return few + 0.3 * torch.randn(tokens, H, D, generator=generator)


def sample_of(numbers: Tensor, gradients: Tensor) -> TokenSample:
    sample = TokenSample.of(len(numbers), at_most=len(numbers), dtype=torch.float32)
    sample.add(numbers, gradients)
    return sample


@pytest.fixture(params=[2, 3])
def config(request: pytest.FixtureRequest) -> KVQConfig:
    return KVQConfig.create(key_bits=request.param, value_bits=request.param)


@pytest.fixture
def numbers() -> Tensor:
    """Of channels with means of their own."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(H, D, generator=generator) / 2
    return means + torch.randn(TOKENS, H, D, generator=generator)


def narrow(config: KVQConfig) -> Codebook:
    """Even steps within half of the range: targets go far beyond them."""
    steps = 1 << config.key_bits
    return Codebook.fit_grid((torch.arange(steps) + 0.5) / steps - 0.5)


def moment_of(gradients: Tensor) -> Tensor:
    moments = GradientMoments()
    moments.add(gradients)
    assert moments.total is not None
    return moments.total


def loss(gradients: Tensor, error: Tensor) -> float:
    return float((gradients * error).sum(-1).square().mean())


def test_keys_of_the_refitted_codebook_lose_less(config: KVQConfig, numbers: Tensor) -> None:
    gradients = correlated(TOKENS, seed=2)
    center, half_range = numbers.mean(0), numbers.std(0) * 2.5
    moment = moment_of(gradients * half_range)
    plain = KeyParameters(center, half_range, narrow(config), 0.05, fit_feedback(moment))
    fitted = refit_keys(plain, sample_of(numbers, gradients), moment, config)
    assert torch.equal(fitted.center, center)
    assert torch.equal(fitted.half_range, half_range)
    losses = []
    for parameters in (plain, fitted):
        packed = pages.encode_keys(numbers.transpose(0, 1), parameters, config)
        decoded = pages.decode_keys(packed, parameters, tokens=TOKENS)
        losses.append(loss(gradients, decoded.transpose(0, 1) - numbers))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("grain", ["token", "head"])
def test_values_decode_to_their_means_and_lose_less(
    config: KVQConfig, numbers: Tensor, grain: str
) -> None:
    config = KVQConfig.create(
        key_bits=config.key_bits, value_bits=config.value_bits, value_grain=grain
    )
    gradients = correlated(TOKENS, seed=2)
    plain = ValueParameters(narrow(config), 0.05, fit_feedback(moment_of(gradients)))
    fitted = refit_values(plain, sample_of(numbers, gradients), moment_of(gradients), config)
    assert fitted.feedback is not None
    without = replace(
        fitted, feedback=fitted.feedback.shifted(torch.zeros_like(fitted.feedback.shift))
    )

    def error(parameters: ValueParameters) -> Tensor:
        packed = pages.encode_values(numbers.transpose(0, 1), parameters, config)
        return pages.decode_values(packed, parameters, tokens=TOKENS).transpose(0, 1) - numbers

    means = [error(parameters).mean(0).square().sum() for parameters in (without, fitted)]
    assert means[1] < means[0] / 2
    assert loss(gradients, error(fitted)) < loss(gradients, error(plain))


def test_keys_without_room_for_outliers(numbers: Tensor) -> None:
    """All targets are rounded, those beyond the range to its ends."""
    config = KVQConfig.create(key_bits=2, value_bits=2, outlier_fraction=0.0)
    gradients = correlated(TOKENS, seed=2)
    half_range = torch.ones(H, D)
    moment = moment_of(gradients)
    plain = KeyParameters(torch.zeros(H, D), half_range, narrow(config), 0.05, fit_feedback(moment))
    fitted = refit_keys(plain, sample_of(numbers, gradients), moment, config)
    assert fitted.codebook.entries.abs().max() <= 1


def test_a_layer_that_the_loss_does_not_reach(numbers: Tensor) -> None:
    """Nothing weighs anything: plain k-means, and means are kept all the same."""
    config = KVQConfig.create(key_bits=3, value_bits=3)
    nothing = torch.zeros(TOKENS, H, D)
    moment = moment_of(nothing)
    values = ValueParameters(narrow(config), 0.05, fit_feedback(moment))
    fitted = refit_values(values, sample_of(numbers, nothing), moment, config)
    assert torch.isfinite(fitted.codebook.entries).all()
    assert fitted.feedback is not None
    assert torch.isfinite(fitted.feedback.shift).all()
