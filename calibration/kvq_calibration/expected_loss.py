"""What quantizing one layer's keys or values is expected to cost, at every width.

To second order the divergence from the unquantized model is ``(g . e)**2 / 2`` a token and head,
with ``e`` what rounding its numbers changed and ``g`` the loss's gradient there, summed over tokens
and heads as if their errors were independent (KVQuant's sensitivity, section 3.3, with what lies
off the diagonal). The errors are those of the real pages, outliers and feedback included.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.allocation import WIDTHS, Kind
from kvq_calibration.capture import KeyValueTap
from kvq_calibration.sensitivity import (
    LossScale,
    activation_gradients,
    backward,
    layer_gradients,
)
from kvq_formats import pages
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import LayerParameters
from kvq_formats.progress import Progress
from kvq_runtime.rope import tap_attention

MOST_TOKENS = 8192
"""Tokens that losses are measured on, in whole windows; more hardly move an allocation."""

ByWidth = Mapping[int, Mapping[int, LayerParameters]]
"""width -> layer_idx -> parameters, keys and values both of that width."""


def expected_losses(
    model: PreTrainedModel,
    windows: Tensor,
    config: KVQConfig,
    fitted: ByWidth,
    *,
    progress: Progress,
) -> dict[tuple[int, Kind], dict[int, float]]:
    """Expected divergence, nats a token, by layer, keys or values, and width.

    Args:
        model: the model that ``fitted`` was measured on.
        windows: int64 ``[S, T]``; as many of the first as ``MOST_TOKENS`` has room for.
        config: sinks and outliers of it matter.
        fitted: parameters of every layer at every width.
        progress: who hears how far it is.
    """
    layers = tuple(fitted[WIDTHS[0]])
    used = windows[: max(1, MOST_TOKENS // windows.shape[1])]
    losses: dict[tuple[int, Kind], dict[int, float]] = {
        (layer, kind): dict.fromkeys(WIDTHS, 0.0) for layer in layers for kind in ("key", "value")
    }
    tap, scale = KeyValueTap(layers=layers), LossScale(model.dtype)
    with (
        tap_attention(model, tap),
        progress.stage("widths", len(used)) as advance,
        activation_gradients(model),
    ):
        for window in used.split(1):
            backward(model, tap, window, scale)
            for layer in layers:
                gradients = layer_gradients(tap, layer, scale)
                keys = tap.keys.pop(layer).numbers()
                values = tap.values.pop(layer)
                key_gradient, value_gradient, key, value = (
                    x.detach()[0, :, config.sink_tokens :].float()
                    for x in (*gradients, keys, values)
                )
                for width in WIDTHS:
                    parameters = fitted[width][layer]
                    uniform = config.with_widths(width)
                    decoded = _decoded_keys(key, parameters, uniform)
                    losses[layer, "key"][width] += _loss(key_gradient, decoded - key)
                    decoded = _decoded_values(value, parameters, uniform)
                    losses[layer, "value"][width] += _loss(value_gradient, decoded - value)
            advance()
    tokens = used.numel()
    return {
        tensor: {width: loss / tokens for width, loss in by_width.items()}
        for tensor, by_width in losses.items()
    }


def _loss(gradient: Tensor, error: Tensor) -> float:
    """Half the square of what each token's head adds; both f32 ``[H, T, D]``."""
    return float((gradient * error).sum(-1).double().square().sum()) / 2


def _decoded_keys(keys: Tensor, parameters: LayerParameters, config: KVQConfig) -> Tensor:
    packed = pages.encode_keys(keys, parameters.key, config)
    return pages.decode_keys(packed, parameters.key, tokens=keys.shape[1])


def _decoded_values(values: Tensor, parameters: LayerParameters, config: KVQConfig) -> Tensor:
    packed = pages.encode_values(values, parameters.value, config)
    return pages.decode_values(packed, parameters.value, tokens=values.shape[1])
