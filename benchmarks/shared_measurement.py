"""Calibrate many configurations of one model from few measurements of it.

What ``pipeline.calibrate`` measures depends on sensitivity, outlier fraction, margin, sinks, value
grain and feedback only; codebooks of any width, Q-Norm and capacities follow from the same
histograms. The sidecars are those that ``calibrate`` returns, one by one, in a fraction of the
time.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.allocation import Losses, allocate
from kvq_calibration.capture import evaluation_mode
from kvq_calibration.expected_loss import expected_losses
from kvq_calibration.layer_fit import (
    Thresholds,
    fit_every_width,
    fit_layer,
    layer_statistics,
    of_widths,
)
from kvq_calibration.layer_points import LayerPoints
from kvq_calibration.pipeline import find_thresholds, measure_points
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import LayerParameters
from kvq_formats.progress import Progress
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.models import quantized_layers
from kvq_runtime.rotary_channels import RotaryChannels

Key = tuple[str, float, float, int, str, bool]
_Widths = dict[int, dict[int, LayerParameters]]
_Measured = tuple[dict[int, LayerPoints], Thresholds, dict[int, RotaryChannels], Losses, _Widths]


def calibrate_all(
    model: PreTrainedModel,
    windows: Tensor,
    configs: Mapping[str, KVQConfig],
    *,
    average_bits: Mapping[str, float] | None = None,
    base_model: BaseModelRecord,
    calibration: CalibrationRecord,
    progress: Progress,
) -> dict[str, Sidecar]:
    """A sidecar for each configuration, by its name; windows are int64 ``[S, T]``.

    Those that ``average_bits`` names get widths by expected loss.
    """
    averages = average_bits or {}
    measured: dict[Key, _Measured] = {}

    def of(config: KVQConfig) -> _Measured:
        key = _key(config)
        if key not in measured:
            measured[key] = _measure(
                model, windows, config, widths=bool(averages), progress=progress
            )
        return measured[key]

    head_dim = base_model.fingerprint.head_dim
    sidecars: dict[str, Sidecar] = {}
    for name, config in configs.items():
        points, thresholds, channels, losses, widths = of(config)
        if name in averages:
            config = config.with_layer_bits(allocate(losses, averages[name]))
            fitted = of_widths(widths, config.layer_bits)
        else:
            fitted = {i: fit_layer(points[i], thresholds[i], config.for_layer(i)) for i in points}
        sidecars[name] = Sidecar(
            config=config,
            base_model=base_model,
            calibration=calibration,
            layers=fitted,
            statistics={i: layer_statistics(points[i], fitted[i]) for i in fitted},
            rotary_channels={i: s for i, s in channels.items() if s != (0, head_dim)},
        )
    return sidecars


def _measure(
    model: PreTrainedModel, windows: Tensor, config: KVQConfig, *, widths: bool, progress: Progress
) -> _Measured:
    layers = quantized_layers(model.config)
    thresholds, channels = find_thresholds(
        model, windows, config, layers, batch_size=1, progress=progress
    )
    points = measure_points(model, windows, config, thresholds, batch_size=1, progress=progress)
    losses: Losses = {}
    fitted: _Widths = {}
    if widths and config.feedback:
        fitted = fit_every_width(points, thresholds, config, progress=progress)
        with evaluation_mode(model):
            losses = expected_losses(model, windows, config, fitted, progress=progress)
    return points, thresholds, channels, losses, fitted


def _key(config: KVQConfig) -> Key:
    """What configurations that measure the same have in common."""
    return (
        config.sensitivity,
        config.outlier_fraction,
        config.range_margin,
        config.sink_tokens,
        config.value_grain,
        config.feedback,
    )
