"""What quantizing one layer's keys or values is expected to cost, at every width.

To second order the divergence from the unquantized model is ``(g . e)**2 / 2`` a token and head,
with ``e`` what rounding its numbers changed and ``g`` the loss's gradient there, summed over tokens
and heads as if their errors were independent (KVQuant's sensitivity, section 3.3, with what lies
off the diagonal). The errors are those of the real pages, outliers and feedback included. What
decoding is damaged by, through queries of later pages (``far_gradients``), is a small part of it,
but what a deployed cache loses; it is made to weigh as much as all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.allocation import WIDTHS, Kind, Losses
from kvq_calibration.far_gradients import FarGradientTap
from kvq_calibration.sensitivity import (
    LossScale,
    activation_gradients,
    backward,
    far_gradients,
    layer_gradients,
)
from kvq_formats import pages
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import LayerParameters
from kvq_formats.progress import Progress
from kvq_runtime.rope import tap_attention

MOST_TOKENS = 8192
"""Tokens that losses are measured on, in whole windows; more hardly move an allocation."""

Sums = dict[tuple[int, Kind], dict[int, float]]
"""``Losses`` that are being added up."""

ByWidth = Mapping[int, Mapping[int, LayerParameters]]
"""width -> layer_idx -> parameters, keys and values both of that width."""


def expected_losses(
    model: PreTrainedModel,
    windows: Tensor,
    config: KVQConfig,
    fitted: ByWidth,
    *,
    progress: Progress,
) -> Losses:
    """Expected divergence, nats a token, by layer, keys or values, and width.

    With far losses in it (see above) it is twice as much.

    Args:
        model: the model that ``fitted`` was measured on.
        windows: int64 ``[S, T]``; as many of the first as ``MOST_TOKENS`` has room for.
        config: sinks and outliers of it matter.
        fitted: parameters of every layer at every width.
        progress: who hears how far it is.
    """
    layers = tuple(fitted[WIDTHS[0]])
    used = windows[: max(1, MOST_TOKENS // windows.shape[1])]
    whole, far = _no_losses(layers), _no_losses(layers)
    scale = LossScale(model.dtype)
    tap = FarGradientTap.of(model, layers, sink_tokens=config.sink_tokens)
    with (
        tap_attention(model, tap),
        progress.stage("widths", len(used)) as advance,
        activation_gradients(model),
    ):
        for window in used.split(1):
            backward(model, tap, window, scale)
            for layer in layers:
                gradients = [(whole, layer_gradients(tap, layer, scale))]
                if (through_later_pages := far_gradients(tap, layer, scale)) is not None:
                    gradients.append((far, through_later_pages))
                keys = _after_sinks(tap.keys.pop(layer).numbers(), config)
                values = _after_sinks(tap.values.pop(layer), config)
                for width in WIDTHS:
                    parameters = fitted[width][layer]
                    uniform = config.with_widths(width)
                    key_error = _decoded_keys(keys, parameters, uniform) - keys
                    value_error = _decoded_values(values, parameters, uniform) - values
                    for losses, (at_keys, at_values) in gradients:
                        losses[layer, "key"][width] += _loss(
                            _after_sinks(at_keys, config), key_error
                        )
                        losses[layer, "value"][width] += _loss(
                            _after_sinks(at_values, config), value_error
                        )
            advance()
    share = _share(whole, far)
    return {
        tensor: {
            width: (loss + share * far[tensor][width]) / used.numel()
            for width, loss in by_width.items()
        }
        for tensor, by_width in whole.items()
    }


def _no_losses(layers: tuple[int, ...]) -> Sums:
    return {
        (layer, kind): dict.fromkeys(WIDTHS, 0.0) for layer in layers for kind in ("key", "value")
    }


def _share(whole: Losses, far: Losses) -> float:
    """What far losses are multiplied by to be as much as all of it, at the width in the middle."""
    middle = WIDTHS[len(WIDTHS) // 2]
    all_of_it, far_part = (
        sum(by_width[middle] for by_width in losses.values()) for losses in (whole, far)
    )
    return all_of_it / far_part if far_part > 0 else 0.0


def _after_sinks(x: Tensor, config: KVQConfig) -> Tensor:
    """``[1, H, T, D]`` -> f32 ``[H, T - sinks, D]``."""
    return x.detach()[0, :, config.sink_tokens :].float()


def _loss(gradient: Tensor, error: Tensor) -> float:
    """Half the square of what each token's head adds; both f32 ``[H, T, D]``."""
    return float((gradient * error).sum(-1).double().square().sum()) / 2


def _decoded_keys(keys: Tensor, parameters: LayerParameters, config: KVQConfig) -> Tensor:
    packed = pages.encode_keys(keys, parameters.key, config)
    return pages.decode_keys(packed, parameters.key, tokens=keys.shape[1])


def _decoded_values(values: Tensor, parameters: LayerParameters, config: KVQConfig) -> Tensor:
    packed = pages.encode_values(values, parameters.value, config)
    return pages.decode_values(packed, parameters.value, tokens=values.shape[1])
