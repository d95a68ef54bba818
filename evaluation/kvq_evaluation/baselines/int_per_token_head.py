"""Uniform codes a token and head, without any rotation: plain round-to-nearest.

The asymmetric quantizer with one scale and zero a token and head that Atom (arXiv 2310.19102) and
QServe (arXiv 2405.04532) store the cache in; ``group`` cuts a head into shorter groups, as FlexGen
(arXiv 2303.06865) does with 64. All three published it at 4 bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kvq_evaluation.baselines import uniform


@dataclass(frozen=True)
class IntPerTokenHead:
    """Keys after RoPE and values, each token's head (or group of it) quantized by itself.

    Fields:
        bits: width of a code, 1 to 8; another raises ConfigError.
        layers: the layers whose cache is quantized.
        group: channels that share a scale and zero, None for the whole head. A head that it does
            not divide ends in a shorter group.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    layers: Collection[int]
    group: int | None = None
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, group=self.group)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(keys)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(values)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 32 / group`` where groups fill the head; sinks and recent tokens at 16."""
        allocated = uniform.allocated_bytes(head_dim, bits=self.bits, group=self.group or head_dim)
        return uniform.with_exact_tokens(8 * allocated / head_dim, self, tokens=tokens)

    def _round_trip(self, vectors: Tensor) -> Tensor:
        return uniform.by_group(
            vectors,
            group=self.group or vectors.shape[-1],
            quantize=partial(uniform.round_trip, bits=self.bits),
        )
