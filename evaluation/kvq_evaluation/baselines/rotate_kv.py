"""RotateKV: keys rotated across heads before RoPE, channels sorted, two-bit codes in groups.

Su et al., IJCAI 2025, arXiv 2501.16383. The steps and their order are those of the authors' code
(ZunhaiSu/RotateKV: ``fuse_weights.py``, ``k_reordering_calibration.py``, ``utils.py``):

- keys before RoPE: a Hadamard matrix over 4 heads at once; then the layer's channels in the order
  of their sums on the calibration text (signed, after the rotation), so that a group holds channels
  of like offset; values: a Hadamard matrix a head;
- groups of 128 a token, both ends of the range times 0.8 at 2 bits and 1 above, an integer zero.

Two things differ. Their sinks are the 20 tokens of a prompt with the most massive activations;
here, as for every method, the first ``sink_tokens``. Their code only simulates storage: a group is
counted with 16 bits for the scale, rounded to fp16 here, and 16 for the zero. Where 4 does not
divide the heads, the largest power of two up to 4 that does is rotated together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Self

from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_evaluation.baselines.hadamard_int import hadamard
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError

HEAD_GROUP = 4


@dataclass(frozen=True)
class RotateKV:
    """Keys before RoPE and values, rotated; groups of a token's channels. Use ``calibrated``.

    Fields:
        bits: width of a code, 1 to 8; another raises ConfigError.
        channel_orders: each quantized layer's channels as sorted, int64 ``[C]``.
        group: channels that share a scale and zero; a shorter head is one group.
        clip_ratio: what both ends of a group's range are multiplied with, above 0, at most 1; None
            for the published one.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: False, keys are quantized before RoPE.
    """

    bits: int
    channel_orders: Mapping[int, Tensor]
    group: int = 128
    clip_ratio: float | None = None
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = False

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, group=self.group)
        if self.clip_ratio is not None and not 0 < self.clip_ratio <= 1:
            raise ConfigError(f"clip_ratio is {self.clip_ratio}; expected above 0, at most 1.")

    @classmethod
    def calibrated(
        cls,
        samples: Mapping[int, LayerSamples],
        *,
        bits: int = 2,
        group: int = 128,
        clip_ratio: float | None = None,
        sink_tokens: int = 1,
        recent_tokens: int = 0,
    ) -> Self:
        """Sort every layer's channels; UnsupportedModelError for a head_dim not a power of two."""
        orders = {
            i: rotated_heads(x.keys).double().sum(0).flatten().argsort(stable=True)
            for i, x in samples.items()
        }
        return cls(bits, orders, group, clip_ratio, sink_tokens, recent_tokens)

    @property
    def layers(self) -> Collection[int]:
        """The layers that were calibrated."""
        return self.channel_orders.keys()

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        order = self.channel_orders[layer_idx].to(keys.device)
        rotated = rotated_heads(keys.transpose(0, 1))
        in_order = rotated.flatten(1)[:, order].view_as(rotated)
        decoded = self._round_trip(in_order).flatten(1)[:, order.argsort()].view_as(rotated)
        # The rotation is its own inverse.
        return rotated_heads(decoded).transpose(0, 1).contiguous()

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        rotation = hadamard(values.shape[-1]).to(values.device)
        return self._round_trip(values @ rotation) @ rotation

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 32 / group`` where groups fill the head; sinks and recent tokens at 16."""
        allocated = uniform.allocated_bytes(
            head_dim, bits=self.bits, group=min(self.group, head_dim)
        )
        return uniform.with_exact_tokens(8 * allocated / head_dim, self, tokens=tokens)

    def _round_trip(self, vectors: Tensor) -> Tensor:
        clip_ratio = self.clip_ratio or (0.8 if self.bits <= 2 else 1.0)
        return uniform.by_group(
            vectors,
            group=min(self.group, vectors.shape[-1]),
            quantize=partial(round_trip, bits=self.bits, clip_ratio=clip_ratio),
        )


def rotated_heads(vectors: Tensor) -> Tensor:
    """f32 ``[T, H, D]`` with up to four neighbouring heads multiplied by one Hadamard matrix."""
    heads = gcd(HEAD_GROUP, vectors.shape[1])
    rotation = hadamard(heads * vectors.shape[2]).to(vectors.device)
    joined = vectors.flatten(1).unflatten(1, (-1, len(rotation)))
    return (joined @ rotation).reshape(vectors.shape)


def round_trip(groups: Tensor, *, bits: int, clip_ratio: float) -> Tensor:
    """What the codes of f32 ``[..., G]`` decode to, each last axis a group of its own; f32."""
    lower, upper = (x * clip_ratio for x in groups.aminmax(dim=-1, keepdim=True))
    scale = ((upper - lower) / (2**bits - 1)).half().float()
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = (-lower / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale
