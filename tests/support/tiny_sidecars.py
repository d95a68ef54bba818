"""Sidecars by hand, for models whose activations nobody has measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.parameters import KeyParameters, LayerParameters, LayerStatistics, ValueParameters
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.supported_models import quantized_layers, text_config
from tiny_models import make_tiny_llama

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel


def make_sidecar(
    bits: int = 4,
    *,
    model: PreTrainedModel | None = None,
    half_range: float = 4.0,
    layer_bits: Mapping[int, tuple[int, int]] | None = None,
    **options: Any,
) -> Sidecar:
    """One for ``model``, the tiny Llama without; wide enough for its activations.

    ``layer_bits``: (key_bits, value_bits) of each layer, in place of ``bits``.
    """
    config = (make_tiny_llama() if model is None else model).config
    fingerprint = Fingerprint.from_config(text_config(config))
    shape = (fingerprint.num_kv_heads, fingerprint.head_dim)
    chosen = KVQConfig.create(**{"key_bits": bits, "value_bits": bits, **options})
    chosen = chosen.with_layer_bits(layer_bits or {})
    center, wide = torch.zeros(shape), torch.full(shape, half_range)
    made = {
        widths: LayerParameters(
            key=KeyParameters(center, wide, _codebook(widths.key_bits), 0.02),
            value=ValueParameters(_codebook(widths.value_bits), 0.02),
        )
        for widths in chosen.layer_counts()
    }
    layers = quantized_layers(config)
    return Sidecar(
        config=chosen,
        base_model=BaseModelRecord(id="test/tiny", revision=None, fingerprint=fingerprint),
        calibration=CalibrationRecord(
            dataset="none", revision=None, num_samples=1, seq_len=8, seed=0, token_sha256="0" * 64
        ),
        layers={i: made[chosen.for_layer(i)] for i in layers},
        statistics={i: LayerStatistics(0.0, 0.0, 0.0, 0.0) for i in layers},
    )


def _codebook(bits: int) -> Codebook:
    return Codebook.fit_grid(torch.linspace(-0.95, 0.95, 1 << bits))
