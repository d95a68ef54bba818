"""QServe's SmoothAttention: static key channel scales, then uniform codes a token and head.

Lin et al., MLSys 2025, arXiv 2405.04532, section 4.2: a channel's scale is ``max|K_i| ** alpha``
with ``alpha = 0.5``, the larger of a RoPE pair ``(i, i + D/2)`` for both, so that it can be folded
into the projections of queries and keys. Keys after RoPE are divided by it and, what folding it
into the queries amounts to, multiplied back here. Scale and zero are fp16 a token and head. Values
are quantized plainly; published at 4 bits. The authors' quantizer (mit-han-lab/lmquant,
``configs/qoq-gchn.yaml``) searches the exponent a layer for the least output error; the paper's
fixed one is used here. Models that rotate a part of the head only are paired by halves all the
same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError


@dataclass(frozen=True)
class QServe:
    """Smoothed keys after RoPE, and values, each token's head by itself. Use ``calibrated``.

    Fields:
        bits: width of a code, 1 to 8; another raises ConfigError.
        key_scales: what each quantized layer's keys are divided by, f32 ``[H, D]``, positive.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    key_scales: Mapping[int, Tensor]
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits)

    @classmethod
    def calibrated(
        cls,
        samples: Mapping[int, LayerSamples],
        *,
        bits: int = 4,
        alpha: float = 0.5,
        sink_tokens: int = 1,
        recent_tokens: int = 0,
    ) -> Self:
        """Scales from the largest magnitudes of keys after RoPE.

        Raises ConfigError unless ``alpha`` is 0 (no smoothing) to 1 (all channels equally wide).
        """
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha is {alpha}; expected 0 to 1.", hint="alpha=0.5")
        scales = {i: smoothing_scales(x.rotated_keys, alpha) for i, x in samples.items()}
        return cls(bits, scales, sink_tokens, recent_tokens)

    @property
    def layers(self) -> Collection[int]:
        """The layers that were calibrated."""
        return self.key_scales.keys()

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        scale = self.key_scales[layer_idx].to(keys.device)[:, None]
        return uniform.round_trip(keys / scale, bits=self.bits) * scale

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return uniform.round_trip(values, bits=self.bits)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 32 / D``; sinks and recent tokens at 16."""
        coded = uniform.group_bits(bits=self.bits, group=head_dim)
        return uniform.with_exact_tokens(coded, self, tokens=tokens)


def smoothing_scales(rotated_keys: Tensor, alpha: float) -> Tensor:
    """``max|K_i| ** alpha`` over f32 ``[T, H, D]``, tied over RoPE pairs; f32 ``[H, D]``."""
    pairs = rotated_keys.abs().amax(dim=0).unflatten(-1, (2, -1)).amax(dim=-2)
    # A pair that is always zero is not scaled.
    scale = pairs.masked_fill(pairs == 0, 1.0) ** alpha
    return torch.cat([scale, scale], dim=-1)
