"""Expected losses against a sum over tokens and heads, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_calibration import expected_loss
from kvq_calibration.allocation import WIDTHS
from kvq_calibration.expected_loss import ByWidth, expected_losses
from kvq_calibration.moments import GradientMoments, fit_feedback
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.parameters import LayerParameters
from kvq_formats.progress import SilentProgress
from kvq_runtime.sidecar_codec import SidecarCodec
from projections import projected
from tiny_sidecars import make_sidecar

SINKS = 2
NARROW, WIDE = 1.0, 4.0
"""Ranges of keys: many are beyond the one, of which few find room; none is beyond the other."""
OPTIONS = {"sink_tokens": SINKS, "outlier_fraction": 0.02, "outlier_capacity": 0.02}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 300, (3, 30), generator=torch.Generator().manual_seed(6))


def fitted_layers(
    model: LlamaForCausalLM, windows: Tensor, *, feedback: bool, half_range: float = WIDE
) -> dict[int, dict[int, LayerParameters]]:
    """By hand: one range for all keys; feedback by the gradients on ``windows``."""
    fitted: dict[int, dict[int, LayerParameters]] = {}
    found = projected(model, windows)
    for width in WIDTHS:
        sidecar = make_sidecar(width, model=model, half_range=half_range, **OPTIONS)
        fitted[width] = sidecar.layers
        if not feedback:
            continue
        for index, layer in sidecar.layers.items():
            key, value = (
                fit_feedback(moments_of(gradient))
                for gradient in (found[index].key_gradient, found[index].value_gradient)
            )
            fitted[width][index] = LayerParameters(
                replace(layer.key, feedback=key), replace(layer.value, feedback=value)
            )
    return fitted


def moments_of(gradients: Tensor) -> Tensor:
    moments = GradientMoments()
    moments.add(gradients.flatten(0, 1))
    assert moments.total is not None
    return moments.total


def losses_by_hand(
    model: LlamaForCausalLM, windows: Tensor, fitted: ByWidth
) -> dict[tuple[int, str], dict[int, float]]:
    """Half of ``(g . e)**2`` of every token after the sinks and head, over all tokens."""
    losses: dict[tuple[int, str], dict[int, float]] = {}
    for width in WIDTHS:
        made = make_sidecar(width, model=model, **OPTIONS)
        codec = SidecarCodec(replace(made, layers=dict(fitted[width])))
        for index, layer in projected(model, windows).items():
            pairs: tuple[tuple[str, Tensor, Tensor, Callable[[int, Tensor], Tensor]], ...] = (
                ("key", layer.keys, layer.key_gradient, codec.decoded_keys),
                ("value", layer.values, layer.value_gradient, codec.decoded_values),
            )
            for kind, numbers, gradients, decode in pairs:
                total = 0.0
                for x, g in zip(numbers, gradients, strict=True):
                    x, g = x[SINKS:].transpose(0, 1), g[SINKS:].transpose(0, 1)
                    error = decode(index, x).double() - x.double()
                    for head in range(len(x)):
                        for token in range(x.shape[1]):
                            along = float(g[head, token].double() @ error[head, token])
                            total += along**2 / 2
                losses.setdefault((index, kind), {})[width] = total / windows.numel()
    return losses


def losses_of(
    model: LlamaForCausalLM, windows: Tensor, fitted: ByWidth
) -> dict[tuple[int, str], dict[int, float]]:
    # Its own widths do not matter.
    config = KVQConfig.create(key_bits=2, value_bits=2, **OPTIONS)
    found = expected_losses(model, windows, config, fitted, progress=SilentProgress())
    return {(layer, str(kind)): by_width for (layer, kind), by_width in found.items()}


@pytest.mark.parametrize("half_range", [NARROW, WIDE])
@pytest.mark.parametrize("feedback", [False, True])
def test_losses_are_those_of_every_token_and_head(
    tiny_llama: LlamaForCausalLM, windows: Tensor, feedback: bool, half_range: float
) -> None:
    fitted = fitted_layers(tiny_llama, windows, feedback=feedback, half_range=half_range)
    expected = losses_by_hand(tiny_llama, windows, fitted)
    found = losses_of(tiny_llama, windows, fitted)
    assert set(found) == {(layer, kind) for layer in (0, 1) for kind in ("key", "value")}
    for tensor, by_width in expected.items():
        # Gradients differ by some hundred f32 roundings.
        assert found[tensor] == pytest.approx(by_width, rel=1e-3)
        assert min(by_width.values()) > 0


def test_far_losses_weigh_as_much_as_all_of_it(tiny_llama: LlamaForCausalLM) -> None:
    """Once 3 bits everywhere are summed up; what each tensor adds to either is its own."""
    windows = torch.randint(3, 300, (1, 600), generator=torch.Generator().manual_seed(6))
    fitted = fitted_layers(tiny_llama, windows, feedback=False)
    near = windows[:, : SINKS + PAGE_TOKENS]
    assert losses_of(tiny_llama, near, fitted) == expected_near(tiny_llama, near, fitted)
    whole = expected_near(tiny_llama, windows, fitted)
    both = losses_of(tiny_llama, windows, fitted)
    far = {t: {w: both[t][w] - whole[t][w] for w in WIDTHS} for t in whole}
    at_three = [sum(losses[tensor][3] for tensor in whole) for losses in (whole, far)]
    assert at_three[1] == pytest.approx(at_three[0], rel=1e-9)
    shares = [whole[tensor][3] / far[tensor][3] for tensor in whole]
    assert max(shares) > 1.05 * min(shares) > 0


def expected_near(
    model: LlamaForCausalLM, windows: Tensor, fitted: ByWidth
) -> dict[tuple[int, str], dict[int, float]]:
    """Without far gradients."""
    with patch.object(expected_loss, "far_gradients", return_value=None):
        return losses_of(model, windows, fitted)


def test_bits_lower_what_is_expected(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    losses = losses_of(tiny_llama, windows, fitted_layers(tiny_llama, windows, feedback=False))
    for by_width in losses.values():
        # A bit halves the errors.
        assert by_width[2] > 2 * by_width[3] > 4 * by_width[4]


class Steps(SilentProgress):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.done = 0

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        self.told.append((name, total))

        def advance() -> None:
            self.done += 1

        yield advance


@pytest.mark.parametrize(("most", "used"), [(1, 1), (59, 1), (60, 2), (89, 2), (90, 3), (1000, 3)])
def test_whole_windows_as_far_as_there_is_room(
    tiny_llama: LlamaForCausalLM,
    windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    used: int,
) -> None:
    fitted = fitted_layers(tiny_llama, windows, feedback=False)
    expected = losses_of(tiny_llama, windows[:used], fitted)
    monkeypatch.setattr(expected_loss, "MOST_TOKENS", most)
    steps = Steps()
    config = KVQConfig.create(**OPTIONS)
    found = expected_losses(tiny_llama, windows, config, fitted, progress=steps)
    assert found == expected
    assert steps.told == [("widths", used)]
    assert steps.done == used


def test_the_models_state_is_left_as_it_was(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    fitted = fitted_layers(tiny_llama, windows, feedback=False)
    with torch.no_grad():
        stock = tiny_llama(windows).logits
    losses_of(tiny_llama.train(), windows, fitted)
    assert tiny_llama.training
    assert all(weight.requires_grad for weight in tiny_llama.parameters())
    assert all(weight.grad is None for weight in tiny_llama.parameters())
    with torch.no_grad():
        assert torch.equal(tiny_llama(windows).logits, stock)
