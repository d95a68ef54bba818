"""Codebooks, Q-Norm, outlier steps and feedback of one layer, from what was kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kvq_calibration.allocation import WIDTHS
from kvq_calibration.layer_points import LayerPoints
from kvq_calibration.moments import at_normalised, fit_feedback
from kvq_calibration.refit import refit_keys, refit_values
from kvq_calibration.residuals import fit_outlier_step
from kvq_formats import outliers
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import (
    KeyParameters,
    LayerParameters,
    LayerStatistics,
    ValueParameters,
)
from kvq_formats.progress import Progress

Thresholds = dict[int, tuple[Tensor, Tensor]]
"""Layer index -> (center, half_range), f32 ``[H, D]``."""


def fit_keys(
    points: LayerPoints, thresholds: tuple[Tensor, Tensor], config: KVQConfig
) -> KeyParameters:
    """Keys at ``config.key_bits``."""
    center, half_range = (t.cpu() for t in thresholds)
    codebook = points.key.fit(config.key_bits, config)
    index_bits = outliers.channel_bits(center.shape[-1])
    step = fit_outlier_step(points.key.outliers, codebook, index_bits=index_bits)
    plain = KeyParameters(center, half_range, codebook, step)
    if not _with_feedback(config):
        return plain
    moment = at_normalised(points.key_moments.with_far(points.far_key_moments), half_range)
    rounded = replace(plain, feedback=fit_feedback(moment))
    return refit_keys(rounded, points.key_sample, moment, config)


def fit_values(points: LayerPoints, config: KVQConfig) -> ValueParameters:
    """Values at ``config.value_bits``."""
    codebook = points.value.fit(config.value_bits, config)
    step = fit_outlier_step(points.value.outliers, codebook, index_bits=outliers.TOKEN_BITS)
    plain = ValueParameters(codebook, step)
    if not _with_feedback(config):
        return plain
    moment = points.value_moments.with_far(points.far_value_moments)
    rounded = replace(plain, feedback=fit_feedback(moment))
    return refit_values(rounded, points.value_sample, moment, config)


def fit_layer(
    points: LayerPoints, thresholds: tuple[Tensor, Tensor], config: KVQConfig
) -> LayerParameters:
    """Keys and values at the widths of ``config``."""
    return LayerParameters(fit_keys(points, thresholds, config), fit_values(points, config))


def fit_every_width(
    points: Mapping[int, LayerPoints],
    thresholds: Thresholds,
    config: KVQConfig,
    *,
    progress: Progress,
) -> dict[int, dict[int, LayerParameters]]:
    """Parameters of every layer with keys and values of 2, 3 and 4 bits: width -> layer_idx."""
    fitted: dict[int, dict[int, LayerParameters]] = {}
    with progress.stage("codebooks of all widths", len(WIDTHS) * len(points)) as advance:
        for width in WIDTHS:
            uniform, fitted[width] = config.with_widths(width), {}
            for layer, kept in points.items():
                fitted[width][layer] = fit_layer(kept, thresholds[layer], uniform)
                advance()
    return fitted


def of_widths(
    fitted: Mapping[int, Mapping[int, LayerParameters]], layer_bits: Mapping[int, tuple[int, int]]
) -> dict[int, LayerParameters]:
    """Each layer's keys and values at its (key_bits, value_bits), from what has every width."""
    return {
        layer: LayerParameters(fitted[key_bits][layer].key, fitted[value_bits][layer].value)
        for layer, (key_bits, value_bits) in layer_bits.items()
    }


def layer_statistics(points: LayerPoints, parameters: LayerParameters) -> LayerStatistics:
    """What the codebooks cost the numbers that were kept."""
    return LayerStatistics(
        key_error=points.key.relative_error(parameters.key.codebook),
        value_error=points.value.relative_error(parameters.value.codebook),
        key_outlier_share=points.key.outlier_share,
        value_outlier_share=points.value.outlier_share,
    )


def _with_feedback(config: KVQConfig) -> bool:
    return config.feedback and config.sensitivity == "fisher"
