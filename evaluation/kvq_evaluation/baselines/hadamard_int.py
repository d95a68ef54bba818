"""Hadamard rotation, then uniform codes a token and head: what most servers ship at 4 bits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_formats.errors import UnsupportedModelError


@dataclass(frozen=True)
class HadamardInt:
    """Keys after RoPE and values, each token's head rotated and quantized by itself.

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
        """``bits + 32 / D``; sinks and recent tokens at 16."""
        coded = uniform.group_bits(bits=self.bits, group=head_dim)
        return uniform.with_exact_tokens(coded, self, tokens=tokens)

    def _round_trip(self, vectors: Tensor) -> Tensor:
        rotation = hadamard(vectors.shape[-1]).to(vectors.device)
        # The matrix is symmetric and orthogonal: it is its own inverse.
        return uniform.round_trip(vectors @ rotation, bits=self.bits) @ rotation


@lru_cache(maxsize=8)
def hadamard(head_dim: int) -> Tensor:
    """Sylvester's Hadamard matrix over ``sqrt(D)``, f32 ``[D, D]``, symmetric and orthogonal.

    Raises UnsupportedModelError unless ``head_dim`` is a power of two.
    """
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise UnsupportedModelError(
            f"the Hadamard baseline needs a head_dim that is a power of two, found {head_dim}.",
            hint="leave this baseline out",
        )
    matrix = torch.ones(1, 1)
    while len(matrix) < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / head_dim**0.5
