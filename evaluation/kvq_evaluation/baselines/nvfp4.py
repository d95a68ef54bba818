"""NVFP4 and MXFP4: four-bit floats in short blocks of a head, each block with an eight-bit scale.

Codes are e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; nearest, ties to the even code).
NVFP4 (NVIDIA, arXiv 2509.25149, appendix on the quantization scheme): blocks of 16, an e4m3 scale
``max|block| / 6`` counted in units of an fp32 scale of the tensor, ``max|tensor| / (6 * 448)``. The
tensor's scale has to be known before the text is: calibrated here, and 1 otherwise, as in servers
that are given none. MXFP4 (OCP Microscaling Formats 1.0, section 6.3): blocks of 32, an e8m0 scale
``2**(floor(log2 max|block|) - 2)``, no scale of the tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from kvq_evaluation.baselines import fp8, uniform
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError

Format = Literal["nvfp4", "mxfp4"]
GROUPS: Mapping[str, int] = {"nvfp4": 16, "mxfp4": 32}
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST = 6.0
# The largest e2m1 number is 1.5 * 2**2.
LARGEST_EXPONENT = 2
# An e8m0 scale is 2**-127 at least; below f32's normal numbers nothing is told apart here.
SMALLEST_EXPONENT = -126


@dataclass(frozen=True)
class Nvfp4:
    """Keys after RoPE and values in e2m1, blocks of each token's head scaled by themselves.

    Fields:
        layers: the layers whose cache is quantized.
        format: "nvfp4" or "mxfp4"; another raises ConfigError. A head that the block does not
            divide ends in a shorter block.
        key_scales, value_scales: NVFP4's scale of the tensor, a layer; 1 for one that is not named.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    layers: Collection[int]
    format: Format = "nvfp4"
    key_scales: Mapping[int, float] = field(default_factory=dict)
    value_scales: Mapping[int, float] = field(default_factory=dict)
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        if self.format not in GROUPS:
            raise ConfigError(
                f"format is {self.format!r}; expected one of {', '.join(GROUPS)}.",
                hint="format='nvfp4'",
            )

    @classmethod
    def calibrated(
        cls, samples: Mapping[int, LayerSamples], *, sink_tokens: int = 1, recent_tokens: int = 0
    ) -> Self:
        """NVFP4 with scales of the tensors from the largest magnitudes of the samples."""
        span = LARGEST * fp8.LARGEST
        return cls(
            layers=tuple(samples),
            key_scales={i: fp8.scale(x.rotated_keys, span) for i, x in samples.items()},
            value_scales={i: fp8.scale(x.values, span) for i, x in samples.items()},
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        )

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._decoded(keys, self.key_scales.get(layer_idx, 1.0))

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._decoded(values, self.value_scales.get(layer_idx, 1.0))

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """4.5 (NVFP4) or 4.25 (MXFP4) where blocks fill the head; sinks and recent tokens at 16."""
        allocated = uniform.allocated_bytes(head_dim, bits=4, group=GROUPS[self.format], metadata=1)
        return uniform.with_exact_tokens(8 * allocated / head_dim, self, tokens=tokens)

    def _decoded(self, vectors: Tensor, tensor_scale: float) -> Tensor:
        def quantize(blocks: Tensor) -> Tensor:
            largest = blocks.abs().amax(dim=-1, keepdim=True)
            if self.format == "nvfp4":
                scale = fp8.round_trip(largest / LARGEST / tensor_scale, scale=1.0) * tensor_scale
            else:
                # frexp's mantissa is below 1: its exponent is floor(log2) + 1.
                exponent = largest.frexp().exponent - 1 - LARGEST_EXPONENT
                scale = torch.ones_like(largest).ldexp(exponent.clamp(min=SMALLEST_EXPONENT))
            # A block whose scale rounds to zero decodes to zeros.
            return round_to_e2m1(blocks / scale.masked_fill(scale == 0, 1.0)) * scale

        return uniform.by_group(vectors, group=GROUPS[self.format], quantize=quantize)


def round_to_e2m1(x: Tensor) -> Tensor:
    """The nearest e2m1 number, f32 of any shape: ties to the even code, saturating at 6."""
    magnitudes = MAGNITUDES.to(x.device)
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    # On a midpoint the two searches differ by one, and one of them is even.
    below = torch.bucketize(x.abs(), midpoints)
    above = torch.bucketize(x.abs(), midpoints, right=True)
    return magnitudes[torch.where(below % 2 == 0, below, above)].copysign(x)
