"""Codebooks and shifts for what is rounded under error feedback: targets, not the numbers.

Targets spread wider than the numbers, the more the coarser the codes, and their squared errors
weigh ``S`` (``kvq_formats.feedback``), not the sensitivity. So the codebook is fitted again to the
targets that it leads to. What rounding against one codebook does to the mean of a channel is taken
back by a shift: attention to many tokens adds up what their errors have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from kvq_calibration.moments import target_weights
from kvq_calibration.points import NormalisedPoints
from kvq_calibration.residuals import fit_outlier_step
from kvq_calibration.token_sample import TokenSample, stride_of
from kvq_formats import outliers, pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.feedback import shape_errors
from kvq_formats.pages import value_thresholds
from kvq_formats.parameters import KeyParameters, ValueParameters

P = TypeVar("P", KeyParameters, ValueParameters)

CODEBOOK_TOKENS = 4096
"""Tokens that a codebook is fitted to, at most."""

MEAN_TOKENS = 16384
"""Tokens that means of errors are taken over, at most. A mean needs more than a codebook does."""

ROUNDS = 2
"""Fits of a codebook to its own targets, and of a shift to the errors that it leaves."""


def refit_keys(
    parameters: KeyParameters, sample: TokenSample, moment: Tensor, config: KVQConfig
) -> KeyParameters:
    """Keys with the codebook that suits their targets.

    Args:
        parameters: with feedback.
        sample: keys of the layer.
        moment: of gradients at the normalised keys, f64 ``[H, D, D]``.
        config: width, solver, Q-Norm and outliers.
    """
    keys = sample.numbers
    D = keys.shape[-1]
    return _with_codebook_of_targets(
        parameters,
        z=(keys - parameters.center) / parameters.half_range,
        weights=target_weights(moment).float() * sample.energy[:, :, None],
        # Without room for outliers all targets are rounded.
        stored=None if outliers.key_pool_capacity(config, D) else torch.zeros((), dtype=torch.bool),
        is_outlier=None,
        fit=lambda points: points.fit(config.key_bits, config),
        index_bits=outliers.channel_bits(D),
    )


def refit_values(
    parameters: ValueParameters, sample: TokenSample, moment: Tensor, config: KVQConfig
) -> ValueParameters:
    """Values with the codebook that suits their targets, and shifts that keep channels' means.

    As ``refit_keys``; ``moment`` is that of gradients at the values as they are.
    """
    numbers = sample.numbers
    stride = stride_of(len(numbers), at_most=CODEBOOK_TOKENS)
    values, energy = numbers[::stride], sample.energy[::stride]
    tokens, H, D = values.shape
    vectors = values.reshape(tokens, 1, H * D) if config.value_grain == "token" else values
    per_side = outliers.value_outliers_per_side(config, H, D)
    half, middle, outside = value_thresholds(vectors, outliers_per_side=per_side)
    is_outlier = outside.reshape(tokens, H, D)
    scale = half.float().expand_as(vectors).reshape(tokens, H, D)
    fitted = _with_codebook_of_targets(
        parameters,
        z=((vectors - middle.float()) / half.float()).reshape(tokens, H, D),
        weights=target_weights(moment).float() * scale.square() * energy[:, :, None],
        stored=_by_head(is_outlier),
        is_outlier=is_outlier,
        fit=lambda points: points.fit(config.value_bits, config),
        index_bits=outliers.TOKEN_BITS,
    )
    return _shifted(fitted, numbers.transpose(0, 1), scale.mean(dim=0), config)


def _with_codebook_of_targets(
    parameters: P,
    *,
    z: Tensor,
    weights: Tensor,
    stored: Tensor | None,
    is_outlier: Tensor | None,
    fit: Callable[[NormalisedPoints], Codebook],
    index_bits: int,
) -> P:
    """``parameters`` with another codebook and outlier step.

    ``z``, ``weights`` and ``is_outlier`` are ``[T, H, D]``, ``stored`` is what ``shape_errors``
    takes; without ``is_outlier`` targets beyond [-1, 1] are outliers.
    """
    assert parameters.feedback is not None
    for _ in range(ROUNDS):
        shaped = shape_errors(
            _by_head(z), parameters.codebook, parameters.feedback, is_outlier=stored
        )
        targets = shaped[0].transpose(0, 1).contiguous()
        points = NormalisedPoints()
        points.add(targets, targets.abs() > 1 if is_outlier is None else is_outlier, weights)
        codebook = fit(points)
        step = fit_outlier_step(points.outliers, codebook, index_bits=index_bits)
        parameters = replace(parameters, codebook=codebook, outlier_step=step)
    return parameters


def _shifted(
    parameters: ValueParameters, values: Tensor, scale: Tensor, config: KVQConfig
) -> ValueParameters:
    """Values f32 ``[H, T, D]`` decode to their own mean; ``scale`` f32 ``[H, D]``, mean range.

    Looked at are pages as they are stored: an outlier that finds no room in them is clamped.
    """
    for _ in range(ROUNDS):
        packed = pages.encode_values(values, parameters, config)
        decoded = pages.decode_values(packed, parameters, tokens=values.shape[1])
        assert parameters.feedback is not None
        missing = (values - decoded).mean(dim=1) / scale
        moved = parameters.feedback.shifted(parameters.feedback.shift + missing)
        parameters = replace(parameters, feedback=moved)
    return parameters


def _by_head(x: Tensor) -> Tensor:
    """``[T, H, D]`` -> ``[1, H, T, D]``, as pages have it."""
    return x.transpose(0, 1)[None]
