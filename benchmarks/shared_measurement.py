"""Calibrate many configurations of one model from few measurements of it.

What ``pipeline.calibrate`` measures depends on sensitivity, outlier fraction, sinks, value grain and
feedback only; codebooks of any width, Q-Norm and capacities follow from the same histograms. The sidecars
are those that ``calibrate`` returns, one by one, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.allocation import allocate
from kvq_calibration.capture import evaluation_mode
from kvq_calibration.expected_loss import expected_losses
from kvq_calibration.pipeline import (
    find_thresholds,
    fit_every_width,
    fit_layer,
    measure_points,
)
from kvq_formats.config import KVQConfig
from kvq_formats.progress import Progress
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.models import quantized_layers

Key = tuple[str, float, int, str, bool]


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
    sidecars: dict[str, Sidecar] = {}
    layers = quantized_layers(model.config)
    head_dim = base_model.fingerprint.head_dim
    for names in _groups(configs):
        first = configs[names[0]]
        thresholds, channels = find_thresholds(
            model, windows, first, layers, batch_size=1, progress=progress
        )
        points = measure_points(model, windows, first, thresholds, batch_size=1, progress=progress)
        losses = {}
        if any(name in averages for name in names):
            fitted_all = fit_every_width(points, thresholds, first, progress=progress)
            with evaluation_mode(model):
                losses = expected_losses(model, windows, first, fitted_all, progress=progress)
        for name in names:
            config = configs[name]
            if name in averages:
                config = config.with_layer_bits(allocate(losses, averages[name]))
            fitted = {i: fit_layer(points[i], thresholds[i], config.for_layer(i)) for i in layers}
            sidecars[name] = Sidecar(
                config=config,
                base_model=base_model,
                calibration=calibration,
                layers={i: parameters for i, (parameters, _) in fitted.items()},
                statistics={i: statistics for i, (_, statistics) in fitted.items()},
                rotary_channels={i: span for i, span in channels.items() if span != (0, head_dim)},
            )
    return {name: sidecars[name] for name in configs}


def _groups(configs: Mapping[str, KVQConfig]) -> Iterator[list[str]]:
    """Names of configurations that measure the same."""
    groups: dict[Key, list[str]] = {}
    for name, config in configs.items():
        key = (
            config.sensitivity,
            config.outlier_fraction,
            config.sink_tokens,
            config.value_grain,
            config.feedback,
        )
        groups.setdefault(key, []).append(name)
    yield from groups.values()
