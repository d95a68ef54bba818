"""Error feedback: what it minimises, what it leaves alone, and a case worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats import pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.feedback import Feedback, shape_errors
from kvq_formats.parameters import KeyParameters, ValueParameters

QUARTERS = Codebook(
    entries=torch.tensor([-0.75, -0.25, 0.25, 0.75]),
    levels=torch.tensor([0, 85, 170, 255], dtype=torch.uint8),
    offset=-0.75,
    step=1.5 / 255,
)


def moment(H: int, D: int, *, seed: int = 0) -> Tensor:
    """Second moments of channels that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(H, 8 * D, D, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(H, D, D, generator=generator, dtype=torch.float64)
    return mixed.mT @ mixed


def dense(feedback: Feedback) -> Tensor:
    """``I + G`` f64 ``[H, D, D]``, in order."""
    H, D = feedback.order.shape
    whole = torch.eye(D, dtype=torch.float64).repeat(H, 1, 1)
    for i in range(D):
        whole[:, i, i + 1 :] = feedback.gain_row(i).double()
    return whole


def test_a_case_by_hand() -> None:
    """M = [[2, 1], [1, 1]] of two channels, no damping.

    The first weighs more and is rounded first. M = (I + G) S (I + G)^T gives G = 1 (the corner:
    S_2 = 1, G S_2 = 1, S_1 = 2 - 1). z = (0.4, 0.4): 0.4 rounds to 0.25, error 0.15, so that the
    target of the second is 0.55, which rounds to 0.75: errors 0.15 and -0.35 with
    2 * 0.0225 - 2 * 0.0525 + 0.1225 = 0.0625. By itself 0.4 would have rounded to 0.25 twice:
    (2 + 2 + 1) * 0.0225 = 0.1125.
    """
    feedback = Feedback.fit(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]).double(), damping=0.0)
    assert feedback.order.tolist() == [[0, 1]]
    assert feedback.gains.tolist() == [[1.0]]
    z = torch.tensor([0.4, 0.4]).reshape(1, 1, 1, 2)
    none = torch.zeros((), dtype=torch.bool)
    targets = shape_errors(z, QUARTERS, feedback, is_outlier=none)
    assert targets.flatten().tolist() == pytest.approx([0.4, 0.55], abs=2**-23)


@pytest.mark.parametrize("D", [1, 2, 16, 80])
def test_gains_are_the_factors_of_the_moments(D: int) -> None:
    found = moment(2, D)
    feedback = Feedback.fit(found, damping=0.0)
    assert torch.equal(feedback.order.sort(-1).values, torch.arange(D).expand(2, D))
    index = feedback.order[:, :, None].expand(2, D, D)
    ordered = found.gather(1, index).gather(2, index.mT)
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    assert (diagonal[:, 1:] <= diagonal[:, :-1]).all()
    whole = dense(feedback)
    # What is left after the factors are taken out is diagonal, up to f16 gains.
    inner = torch.linalg.solve_triangular(whole, ordered, upper=True)
    inner = torch.linalg.solve_triangular(whole, inner.mT, upper=True)
    rest = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    # A gain is off by 2**-11 of itself; D of them meet in an entry, twice.
    bound = 2 * D * 2**-11 * whole.abs().max() ** 2 * diagonal.max()
    assert rest.abs().max() <= bound


def expected_loss(error: Tensor, moments: Tensor) -> float:
    """Sum of ``e^T M e`` over tokens, of errors f32 ``[P, H, T, D]``."""
    return float(torch.einsum("phtd,hde,phte->", error.double(), moments, error.double()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_lowers_the_expected_loss(bits: int) -> None:
    H, T, D = 2, 300, 32
    codebook = Codebook.fit_grid(torch.linspace(-1, 1, 1 << bits))
    z = torch.rand(1, H, T, D, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = moment(H, D)
    none = torch.zeros((), dtype=torch.bool)
    targets = shape_errors(z, codebook, Feedback.fit(found, damping=0.01), is_outlier=none)
    alone = codebook.decode(codebook.encode(z)) - z
    shaped = codebook.decode(codebook.encode(targets)) - z
    # The plain error is larger, what it costs is a fraction.
    assert shaped.square().sum() > alone.square().sum()
    assert expected_loss(shaped, found) < 0.5 * expected_loss(alone, found)


def test_a_loss_that_knows_no_neighbours_changes_nothing() -> None:
    z = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(2)) / 2
    for moments in (torch.eye(8).double().repeat(3, 1, 1), torch.zeros(3, 8, 8).double()):
        feedback = Feedback.fit(moments, damping=0.03)
        assert torch.equal(shape_errors(z, QUARTERS, feedback, is_outlier=None), z)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1]),
    seed=st.integers(0, 1000),
    fraction=st.sampled_from([0.0, 0.01]),
)
def test_codes_depend_on_their_own_token_alone(tokens: int, seed: int, fraction: float) -> None:
    H, D = 2, 16
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(H, tokens, D, generator=generator) / 3
    feedback = Feedback.fit(moment(H, D), damping=0.03)
    parameters = KeyParameters(
        torch.zeros(H, D), torch.ones(H, D), QUARTERS, outlier_step=0.01, feedback=feedback
    )
    values = ValueParameters(QUARTERS, outlier_step=0.01, feedback=feedback)
    config = KVQConfig(key_bits=2, value_bits=2, outlier_fraction=fraction, outlier_capacity=0.2)
    config = config.model_copy(update={"value_capacity_factor": 4.0})
    whole = pages.decode_keys(
        pages.encode_keys(keys, parameters, config), parameters, tokens=tokens
    )
    whole_values = pages.decode_values(
        pages.encode_values(keys, values, config), values, tokens=tokens
    )
    for token in {0, tokens // 2, tokens - 1} if tokens else set():
        one = keys[:, token : token + 1]
        alone = pages.decode_keys(pages.encode_keys(one, parameters, config), parameters, tokens=1)
        assert torch.equal(whole[:, token], alone[:, 0])
        alone = pages.decode_values(pages.encode_values(one, values, config), values, tokens=1)
        assert torch.equal(whole_values[:, token], alone[:, 0])


def test_channels_in_another_order_give_the_same_numbers() -> None:
    H, D = 2, 12
    keys = torch.randn(H, 40, D, generator=torch.Generator().manual_seed(3)) / 3
    half_range = torch.rand(H, D, generator=torch.Generator().manual_seed(4)) + 0.5
    feedback = Feedback.fit(moment(H, D), damping=0.03)
    parameters = KeyParameters(torch.zeros(H, D), half_range, QUARTERS, 0.01, feedback)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(5))
    turned = replace(
        parameters, half_range=half_range[:, order], feedback=feedback.reordered(order)
    )
    config = KVQConfig(key_bits=2, value_bits=2, outlier_capacity=0.2)
    found = pages.decode_keys(
        pages.encode_keys(keys[..., order], turned, config), turned, tokens=40
    )
    expected = pages.decode_keys(pages.encode_keys(keys, parameters, config), parameters, tokens=40)
    assert torch.equal(found, expected[..., order])


def test_an_outlier_has_no_error_to_pass_on() -> None:
    """Channel 0 lies far out: stored, it leaves the others alone; clamped, it moves them."""
    feedback = Feedback.fit(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]).double(), damping=0.0)
    z = torch.tensor([3.0, 0.1]).reshape(1, 1, 1, 2)
    assert torch.equal(shape_errors(z, QUARTERS, feedback, is_outlier=None), z)
    none = torch.zeros((), dtype=torch.bool)
    clamped = shape_errors(z, QUARTERS, feedback, is_outlier=none)
    # 3 decodes to 0.75: what is missing, 2.25, is asked of channel 1.
    assert clamped.flatten().tolist() == pytest.approx([3.0, 2.35])
