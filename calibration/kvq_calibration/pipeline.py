"""Calibration from end to end: windows of tokens in, a sidecar out.

Two passes over the text. The first finds the thresholds of every key channel. The second finds the
sensitivity of every key and value and drops each batch, weighted, into histograms of the normalised
inliers, from which codebooks, Q-Norm and outlier steps are computed. Codebooks of numbers that get
error feedback are then fitted again to a sample of tokens. What is held between batches grows
neither with tokens nor with layers times tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.allocation import allocate, check_average
from kvq_calibration.capture import (
    KeyValueTap,
    evaluation_mode,
    finite,
    run_decoder,
    token_rows,
)
from kvq_calibration.expected_loss import expected_losses
from kvq_calibration.far_gradients import FarGradientTap
from kvq_calibration.layer_fit import (
    Thresholds,
    fit_every_width,
    fit_layer,
    layer_statistics,
    of_widths,
)
from kvq_calibration.layer_points import LayerPoints
from kvq_calibration.packed_weights import weights_as_loaded
from kvq_calibration.sensitivity import (
    LossScale,
    activation_gradients,
    backward,
    far_gradients,
    layer_gradients,
)
from kvq_calibration.thresholds import ChannelQuantiles, center_and_half_range
from kvq_formats import outliers
from kvq_formats.config import KVQConfig
from kvq_formats.errors import CalibrationError, DataError
from kvq_formats.pages import value_thresholds
from kvq_formats.parameters import LayerParameters
from kvq_formats.progress import Progress, SilentProgress
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.models import quantized_layers
from kvq_runtime.rope import tap_attention
from kvq_runtime.rotary_channels import RotaryChannels


def find_thresholds(
    model: PreTrainedModel,
    windows: Tensor,
    config: KVQConfig,
    layers: tuple[int, ...],
    *,
    batch_size: int,
    progress: Progress,
) -> tuple[Thresholds, dict[int, RotaryChannels]]:
    """First pass: centre and half-range of every key channel, f32 ``[H, D]`` a layer.

    And which channels each layer rotates.
    """
    total = windows.shape[0] * (windows.shape[1] - config.sink_tokens)
    quantiles = {
        layer: ChannelQuantiles(config.outlier_fraction, total_tokens=total) for layer in layers
    }
    tap = KeyValueTap(layers=layers, keep_values=False)
    channels: dict[int, RotaryChannels] = {}
    batches = windows.split(batch_size)
    with tap_attention(model, tap), progress.stage("thresholds", len(batches)) as advance:
        for batch in batches:
            tap.start()
            run_decoder(model, batch)
            tap.stop()
            for layer, quantile in quantiles.items():
                keys = token_rows(tap.keys[layer].numbers(), sink_tokens=config.sink_tokens)
                quantile.add(finite(keys, layer_idx=layer, what="keys"))
                channels[layer] = tap.keys[layer].channels
            advance()
    thresholds = {
        layer: center_and_half_range(*quantile.thresholds(), margin=config.range_margin)
        for layer, quantile in quantiles.items()
    }
    return thresholds, channels


def _add_layer(
    points: LayerPoints,
    keys: Tensor,
    values: Tensor,
    gradients: tuple[Tensor, Tensor] | None,
    thresholds: tuple[Tensor, Tensor],
    config: KVQConfig,
) -> None:
    """One layer of one batch into its histograms; all ``[tokens, H, D]``, weight F * half_range^2.

    The half-range belongs into the weight (KVQuant, equation 7): a step of the normalised range is
    worth that much in a channel.
    """
    center, half_range = thresholds
    z = (keys - center) / half_range
    weight = None if gradients is None else (gradients[0] * half_range).square()
    points.key.add(z, z.abs() > 1, weight)

    tokens, H, D = values.shape
    vectors = values.reshape(tokens, 1, H * D) if config.value_grain == "token" else values
    per_side = outliers.value_outliers_per_side(config, H, D)
    half, middle, is_outlier = value_thresholds(vectors, outliers_per_side=per_side)
    z = ((vectors - middle.float()) / half.float()).reshape(tokens, H, D)
    scale = half.float().expand_as(vectors).reshape(tokens, H, D)
    weight = None if gradients is None else (gradients[1] * scale).square()
    points.value.add(z, is_outlier.reshape(tokens, H, D), weight)
    if gradients is not None:
        points.key_moments.add(gradients[0])
        points.value_moments.add(gradients[1])
        points.key_sample.add(keys, gradients[0])
        points.value_sample.add(values, gradients[1])


def measure_points(
    model: PreTrainedModel,
    windows: Tensor,
    config: KVQConfig,
    thresholds: Thresholds,
    *,
    batch_size: int,
    progress: Progress,
) -> dict[int, LayerPoints]:
    """Second pass: histograms of normalised keys and values by layer, weighted by sensitivity."""
    total = windows.shape[0] * (windows.shape[1] - config.sink_tokens)
    points = {layer: LayerPoints.of(total, model.dtype) for layer in thresholds}
    tap = FarGradientTap.of(model, tuple(thresholds), sink_tokens=config.sink_tokens)
    batches = windows.split(batch_size)
    weighted = config.sensitivity == "fisher"

    def rows(x: Tensor) -> Tensor:
        return token_rows(x, sink_tokens=config.sink_tokens)

    def add(
        layer: int,
        gradients: tuple[Tensor, Tensor] | None,
        far: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        keys = finite(rows(tap.keys.pop(layer).numbers()), layer_idx=layer, what="keys")
        values = finite(rows(tap.values.pop(layer)), layer_idx=layer, what="values")
        kept = None if gradients is None else (rows(gradients[0]), rows(gradients[1]))
        _add_layer(points[layer], keys, values, kept, thresholds[layer], config)
        if far is not None:
            points[layer].far_key_moments.add(rows(far[0]))
            points[layer].far_value_moments.add(rows(far[1]))

    with tap_attention(model, tap), progress.stage("sensitivity", len(batches)) as advance:
        if weighted:
            scale = LossScale(model.dtype)
            with activation_gradients(model):
                for batch in batches:
                    backward(model, tap, batch, scale)
                    for layer in thresholds:
                        add(
                            layer,
                            layer_gradients(tap, layer, scale),
                            far_gradients(tap, layer, scale),
                        )
                    advance()
        else:
            for batch in batches:
                tap.start()
                run_decoder(model, batch)
                tap.stop()
                for layer in thresholds:
                    add(layer, None)
                advance()
    return points


def _fit_layers(
    points: Mapping[int, LayerPoints],
    thresholds: Thresholds,
    config: KVQConfig,
    *,
    progress: Progress,
) -> dict[int, LayerParameters]:
    parameters = {}
    with progress.stage("codebooks", len(points)) as advance:
        for layer, kept in points.items():
            parameters[layer] = fit_layer(kept, thresholds[layer], config.for_layer(layer))
            advance()
    return parameters


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    config: KVQConfig,
    *,
    base_model: BaseModelRecord,
    calibration: CalibrationRecord,
    average_bits: float | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Sidecar:
    """Measure ``model`` on ``windows`` and fit everything that a sidecar holds.

    Args:
        model: a causal language model in bf16, fp16 or fp32. Its weights are not changed.
        windows: token ids i64 ``[S, T]``, no padding.
        config: bits, outliers, sinks, solver.
        base_model, calibration: what the sidecar says of its origin.
        average_bits: give every layer's keys and values 2, 3 or 4 bits, so that the expected loss
            is the least that this average of widths allows; the widths of ``config`` are not used.
        batch_size: windows a step.
        progress: who hears how far it is.

    Raises:
        ConfigError: an average outside 2 to 4, or one without sensitivity.
        DataError: windows that leave no token after the sinks.
        UnsupportedModelError: attention that kvq does not understand.
        CalibrationError: NaN activations or gradients.
    """
    progress = progress or SilentProgress()
    if windows.shape[0] == 0 or windows.shape[1] < config.sink_tokens + 2:
        raise DataError(
            f"calibration needs windows of at least {config.sink_tokens + 2} tokens, found "
            f"{windows.shape[0]} of {windows.shape[1]}.",
            hint="--seq-len, or fewer --sink-tokens",
        )
    if average_bits is not None:
        check_average(average_bits, config)
    layers = quantized_layers(model.config)
    try:
        with evaluation_mode(model), weights_as_loaded(model):
            thresholds, channels = find_thresholds(
                model, windows, config, layers, batch_size=batch_size, progress=progress
            )
            points = measure_points(
                model, windows, config, thresholds, batch_size=batch_size, progress=progress
            )
            if average_bits is not None:
                fitted = fit_every_width(points, thresholds, config, progress=progress)
                losses = expected_losses(model, windows, config, fitted, progress=progress)
                config = config.with_layer_bits(allocate(losses, average_bits))
                parameters = of_widths(fitted, config.layer_bits)
            else:
                parameters = _fit_layers(points, thresholds, config, progress=progress)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"out of GPU memory while measuring {windows.shape[1]} tokens at a time: {error}",
            hint="--batch-size 1, --seq-len 1024, or --sensitivity none",
        ) from error
    head_dim = base_model.fingerprint.head_dim
    return Sidecar(
        config=config,
        base_model=base_model,
        calibration=calibration,
        layers=parameters,
        statistics={layer: layer_statistics(points[layer], parameters[layer]) for layer in layers},
        rotary_channels={layer: span for layer, span in channels.items() if span != (0, head_dim)},
    )
