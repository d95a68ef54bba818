"""What calibrated baselines learn from: a layer's keys, values and queries on sample text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.capture import KeyValueTap, evaluation_mode, finite, run_decoder, token_rows
from kvq_calibration.sensitivity import (
    LossScale,
    activation_gradients,
    backward,
    layer_gradients,
)
from kvq_formats.errors import DataError
from kvq_runtime.models import quantized_layers
from kvq_runtime.rope import AttentionCall, tap_attention

MAX_TOKENS = 32_768
"""Tokens of a layer that are held. All layers are held at once, in f32: for a model of 32 layers
with 8 heads of 128 channels and 32 query heads, 4 GiB at 2,048 tokens."""


@dataclass(frozen=True)
class LayerSamples:
    """One layer on the calibration text: the tokens after the sinks of all windows, f32.

    Fields:
        keys: ``[T, H, D]`` before RoPE, after any k-norm.
        rotated_keys: ``[T, H, D]`` after RoPE, as attended.
        values: ``[T, H, D]``.
        queries: ``[T, HQ, D]`` after RoPE.
        key_sensitivity, value_sensitivity: ``[T, H, D]``, squared gradient of the loss at keys
            before RoPE and at values; None where it was not asked for.
    """

    keys: Tensor
    rotated_keys: Tensor
    values: Tensor
    queries: Tensor
    key_sensitivity: Tensor | None = None
    value_sensitivity: Tensor | None = None


def collect_samples(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    sink_tokens: int = 1,
    sensitivity: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> dict[int, LayerSamples]:
    """Run sample text through the model and keep what every quantized layer attends over.

    Args:
        model: a causal language model; its weights are not changed.
        windows: token ids int64 ``[S, T]``, no padding.
        sink_tokens: first tokens of a window that are left out.
        sensitivity: also take gradients.
        max_tokens: beyond them windows are thinned out to every n-th token.

    Raises DataError for windows without a token after the sinks, CalibrationError for numbers that
    are not finite.
    """
    if windows.dim() != 2 or len(windows) == 0 or windows.shape[1] < sink_tokens + 2:
        raise DataError(
            f"samples need windows of at least {sink_tokens + 2} tokens, found "
            f"{list(windows.shape)}.",
            hint="a longer --seq-len",
        )
    layers = quantized_layers(model.config)
    stride = -(-windows.shape[0] * windows.shape[1] // max_tokens)
    tap = _SampleTap(layers=layers)
    parts: dict[int, list[LayerSamples]] = {layer: [] for layer in layers}

    def take(layer: int, gradients: tuple[Tensor, Tensor] | None) -> None:
        def rows(x: Tensor, what: str) -> Tensor:
            kept = token_rows(x, sink_tokens=sink_tokens)[::stride]
            return finite(kept, layer_idx=layer, what=what).cpu()

        squares: list[Tensor | None] = [None, None]
        if gradients is not None:
            squares = [rows(gradient, "gradients").square() for gradient in gradients]
        parts[layer].append(
            LayerSamples(
                keys=rows(tap.keys[layer].numbers(), "keys"),
                rotated_keys=rows(tap.rotated_keys[layer], "keys"),
                values=rows(tap.values[layer], "values"),
                queries=rows(tap.queries[layer], "queries"),
                key_sensitivity=squares[0],
                value_sensitivity=squares[1],
            )
        )

    with evaluation_mode(model), tap_attention(model, tap):
        if sensitivity:
            scale = LossScale(model.dtype)
            with activation_gradients(model):
                for window in windows.split(1):
                    backward(model, tap, window, scale)
                    for layer in layers:
                        take(layer, layer_gradients(tap, layer, scale))
        else:
            for window in windows.split(1):
                tap.start()
                run_decoder(model, window)
                tap.stop()
                for layer in layers:
                    take(layer, None)
    return {layer: _joined(found) for layer, found in parts.items()}


@dataclass
class _SampleTap(KeyValueTap):
    """Keeps queries and rotated keys as well, ``[B, HQ, T, D]`` and ``[B, H, T, D]``."""

    rotated_keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if self.recording and call.layer_idx in self.layers:
            self.rotated_keys[call.layer_idx] = call.key.detach()
            self.queries[call.layer_idx] = call.query.detach()
        return super().on_attention(call)


def _joined(parts: list[LayerSamples]) -> LayerSamples:
    def join(name: str) -> Tensor | None:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces)

    joined: Mapping[str, Tensor | None] = {name: join(name) for name in vars(parts[0])}
    return LayerSamples(**joined)  # type: ignore[arg-type]
