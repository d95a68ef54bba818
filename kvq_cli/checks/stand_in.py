"""A sidecar that nobody has calibrated, of the shape that one would have: bytes are counted on it.

Its codebooks are even grids. What it takes in memory and on the disk depends on options and shapes,
not on what a calibration finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvq_formats.codebook import Codebook
    from kvq_formats.config import KVQConfig
    from kvq_formats.records import BaseModelRecord
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.rotary_channels import RotaryChannels

HALF_RANGE = 4.0
"""Of every key channel; random keys of a miniature lie within."""


def stand_in(
    record: BaseModelRecord, config: KVQConfig, channels: Mapping[int, RotaryChannels]
) -> Sidecar:
    """One for a model that ``record`` describes; ``channels`` of each layer that is quantized."""
    import torch

    from kvq_formats.feedback import Feedback
    from kvq_formats.parameters import (
        KeyParameters,
        LayerParameters,
        LayerStatistics,
        ValueParameters,
    )
    from kvq_formats.records import CalibrationRecord
    from kvq_formats.sidecar import Sidecar

    shape = (record.fingerprint.num_kv_heads, record.fingerprint.head_dim)
    center, half_range = torch.zeros(shape), torch.full(shape, HALF_RANGE)
    feedback = None
    if config.feedback and config.sensitivity == "fisher":
        # Channels that have nothing to do with each other: the right number of gains and shifts,
        # all zero.
        apart = torch.eye(shape[1], dtype=torch.float64).expand(shape[0], -1, -1)
        feedback = Feedback.fit(apart, damping=0.0)
    made = {
        layer: LayerParameters(
            KeyParameters(center, half_range, _grid(layer.key_bits), 0.02, feedback),
            ValueParameters(_grid(layer.value_bits), 0.02, feedback),
        )
        for layer in config.layer_counts()
    }
    whole = (0, record.fingerprint.head_dim)
    return Sidecar(
        config=config,
        base_model=record,
        calibration=CalibrationRecord(
            dataset="none", revision=None, num_samples=1, seq_len=8, seed=0, token_sha256="0" * 64
        ),
        layers={index: made[config.for_layer(index)] for index in channels},
        statistics=dict.fromkeys(channels, LayerStatistics(0.0, 0.0, 0.0, 0.0)),
        rotary_channels={index: found for index, found in channels.items() if found != whole},
    )


def _grid(bits: int) -> Codebook:
    import torch

    from kvq_formats.codebook import Codebook

    return Codebook.fit_grid(torch.linspace(-0.95, 0.95, 1 << bits))
