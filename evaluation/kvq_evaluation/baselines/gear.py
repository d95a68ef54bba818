"""GEAR: KIVI's codes, the largest numbers apart, and a low-rank matrix for what rounding lost.

Kang et al., arXiv 2403.05527, section 3: ``X = D + L + S``.

- S: of each key channel along the tokens, and of each token's values of all heads, the share
  ``outlier_fraction / 2`` of largest and as many smallest numbers, in fp16. Their vector's mean
  takes their place (opengear-project/GEAR, ``GEARLM/Simulated/compress_function.py``).
- D: uniform codes in KIVI's groups, of 64 in their scripts at 2 bits.
- L: the best approximation of rank 4 (their prefill) to ``X - D - S``, a head at a time, factors
  in fp16; by exact singular vectors, where they iterate from a random start.

The whole text is one prefill, so outliers of keys and factors are chosen knowing all of it, which
favours this method. Published decoding adds factors of rank 2 for each buffer of new tokens; the
fp16 buffer is ``recent_tokens``. The paper is followed where the code differs: that takes as many
outliers from a key channel as from a token's values, and ``b**2`` levels, too many for 3 bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_evaluation.baselines.kivi import Kivi
from kvq_formats.errors import ConfigError

# An fp16 number and its place in its vector.
OUTLIER_BITS = 32


@dataclass(frozen=True)
class Gear:
    """Keys after RoPE and values. Any head_dim.

    Fields:
        bits: width of a code, keys and values alike, 1 to 8; another raises ConfigError.
        layers: the layers whose cache is quantized.
        group: tokens (keys) and channels (values) that share a scale and zero, as in ``Kivi``.
        rank: of each head's low-rank matrix, 0 for none; below 0 raises ConfigError.
        outlier_fraction: share of numbers kept apart, from 0 to below 1; another: ConfigError.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    layers: Collection[int]
    group: int = 64
    rank: int = 4
    outlier_fraction: float = 0.02
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, group=self.group)
        if self.rank < 0 or not 0 <= self.outlier_fraction < 1:
            raise ConfigError(
                f"rank is {self.rank} and outlier_fraction {self.outlier_fraction}; expected 0 or "
                "more, and 0 to below 1.",
                hint="rank=4, outlier_fraction=0.02",
            )

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What f32 ``[H, T, D]``, taken as one prefill, decodes to."""
        apart = extremes(keys.mT, self.outlier_fraction).mT
        backbone = torch.where(apart, keys.mean(dim=1, keepdim=True), keys)
        return self._corrected(keys, self._kivi().decoded_keys(layer_idx, backbone), apart)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What f32 ``[H, T, D]``, taken as one prefill, decodes to."""
        num_kv_heads, _, head_dim = values.shape
        apart = extremes(values.transpose(0, 1).flatten(1), self.outlier_fraction)
        apart = apart.unflatten(-1, (num_kv_heads, head_dim)).transpose(0, 1)
        backbone = torch.where(apart, values.mean(dim=(0, 2), keepdim=True), values)
        return self._corrected(values, self._kivi().decoded_values(layer_idx, backbone), apart)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """KIVI's, ``32 * outlier_fraction`` and ``16 * rank / D``; sinks and window at 16 bits."""
        coded_tokens = None if tokens is None else uniform.coded_tokens(self, tokens)
        channels, rank = num_kv_heads * head_dim, min(self.rank, head_dim)
        apart, factors = self.outlier_fraction, rank / head_dim
        if coded_tokens is not None:
            apart = _each_side(coded_tokens, self.outlier_fraction) * 2 / coded_tokens
            factors = min(rank, coded_tokens) * (1 / coded_tokens + 1 / head_dim)
        apart += _each_side(channels, self.outlier_fraction) * 2 / channels
        coded = self._kivi().effective_bits(num_kv_heads, head_dim, tokens=coded_tokens)
        coded += OUTLIER_BITS * apart / 2 + uniform.EXACT_BITS * factors
        return uniform.with_exact_tokens(coded, self, tokens=tokens)

    def _kivi(self) -> Kivi:
        return Kivi(bits=self.bits, layers=self.layers, group=self.group, sink_tokens=0)

    def _corrected(self, exact: Tensor, coded: Tensor, apart: Tensor) -> Tensor:
        coded = torch.where(apart, exact.half().float(), coded)
        return (coded + low_rank(exact - coded, self.rank)).contiguous()


def extremes(vectors: Tensor, fraction: float) -> Tensor:
    """Bool ``[..., E]``: the ``fraction / 2`` largest and smallest of each f32 ``[..., E]``."""
    place = vectors.argsort(dim=-1, stable=True).argsort(dim=-1)
    count = _each_side(vectors.shape[-1], fraction)
    return (place < count) | (place >= vectors.shape[-1] - count)


def low_rank(residual: Tensor, rank: int) -> Tensor:
    """The best approximation of ``rank`` to each matrix of f32 ``[H, T, D]``, factors in fp16."""
    # Right singular vectors from D x D numbers, however many tokens there are.
    gram = residual.double().mT @ residual.double()
    directions = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank].float()
    return (residual @ directions).half().float() @ directions.half().float().mT


def _each_side(numbers: int, fraction: float) -> int:
    return int(numbers * fraction / 2)
