"""FP8 e4m3 with one scale a layer for keys and one for values: the cache that servers ship.

vLLM's ``kv_cache_dtype="fp8"``: ``x / scale`` is rounded to e4m3 (OCP OFP8: largest 448, smallest
step 2**-9) and saturates. Without calibration the scale is 1. Its own calibration
(``calculate_kv_scales``) divides the largest magnitude seen by 200 for keys and by 100 for values
(``K_SCALE_CONSTANT``, ``V_SCALE_CONSTANT`` in ``vllm/envs.py``), well below 448, so that text with
larger numbers does not saturate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_evaluation.samples import LayerSamples

LARGEST = 448.0
KEY_RANGE = 200.0
VALUE_RANGE = 100.0


@dataclass(frozen=True)
class Fp8:
    """Keys after RoPE and values in e4m3.

    Fields:
        layers: the layers whose cache is quantized.
        key_scales, value_scales: the scale of each layer; 1 for a layer that is not named.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    layers: Collection[int]
    key_scales: Mapping[int, float] = field(default_factory=dict)
    value_scales: Mapping[int, float] = field(default_factory=dict)
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    @classmethod
    def calibrated(
        cls,
        samples: Mapping[int, LayerSamples],
        *,
        sink_tokens: int = 1,
        recent_tokens: int = 0,
    ) -> Self:
        """Scales from the largest magnitudes of the samples, as vLLM's calibration sets them."""
        return cls(
            layers=tuple(samples),
            key_scales={i: scale(x.rotated_keys, KEY_RANGE) for i, x in samples.items()},
            value_scales={i: scale(x.values, VALUE_RANGE) for i, x in samples.items()},
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        )

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return round_trip(keys, scale=self.key_scales.get(layer_idx, 1.0))

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return round_trip(values, scale=self.value_scales.get(layer_idx, 1.0))

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """8; sinks and recent tokens at 16."""
        return uniform.with_exact_tokens(8.0, self, tokens=tokens)


def scale(x: Tensor, largest_code: float) -> float:
    """What maps the largest magnitude of ``x`` to ``largest_code``; 1 where all are zero."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return largest / largest_code if largest > 0 else 1.0


def round_trip(x: Tensor, *, scale: float | Tensor) -> Tensor:
    """``x / scale``, f32 of any shape, to e4m3 and back: nearest, ties to even, saturating."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale
