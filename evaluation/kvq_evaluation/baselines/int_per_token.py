"""Uniform codes a token over the layer's whole vector: KVQuant's ``int3 per token`` baseline."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from kvq_evaluation.baselines import uniform


@dataclass(frozen=True)
class IntPerToken:
    """Keys after RoPE and values, one scale and zero for a token's vector of all heads.

    Fields:
        bits: width of a code.
        layers: the layers whose cache is quantized.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    layers: Collection[int]
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(keys)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(values)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 32 / C``; sinks and recent tokens at 16."""
        coded = uniform.group_bits(bits=self.bits, group=num_kv_heads * head_dim)
        return uniform.with_exact_tokens(coded, self, tokens=tokens)

    def _round_trip(self, vectors: Tensor) -> Tensor:
        num_kv_heads, tokens, head_dim = vectors.shape
        by_token = vectors.transpose(0, 1).reshape(tokens, num_kv_heads * head_dim)
        decoded = uniform.round_trip(by_token, bits=self.bits)
        return decoded.reshape(tokens, num_kv_heads, head_dim).transpose(0, 1).contiguous()
