"""TurboQuant: a random rotation, then the best scalar codebook for a coordinate of a unit vector.

Zandieh et al., ICLR 2026, arXiv 2504.19874, Algorithm 1 (the variant for least squared error, bits
as many as named). A vector's norm is kept apart; its direction is rotated by a Haar-random
orthogonal matrix (QR of a Gaussian one), so that each coordinate ``x`` has the density
``(1 - x**2)**((D - 3) / 2)`` up to a constant (Lemma 1), whose Lloyd-Max codebook needs no text.

Left out: Algorithm 2, which spends one bit on a QJL sketch of the residual (vLLM leaves it out as
well), and the paper's wider codes for outlier channels behind its fractional widths. vLLM's presets
(``turboquant/config.py``) differ: a plain Hadamard matrix as the rotation, a Gaussian for the
density, uniform codes for values, exact first and last layers, and ``norm_correction``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvq_calibration.kmeans import WeightedBins, fit_codebook
from kvq_evaluation.baselines import uniform

NORM_BYTES = 2
"""A vector's norm in fp16, as in vLLM."""

REACH = 8.0
"""Standard deviations of a coordinate, ``1 / sqrt(D)``, that the codebook is fitted over."""

GRID = 2**16
"""Points that stand for the density."""


@dataclass(frozen=True)
class TurboQuant:
    """Keys after RoPE and values, each token's head by itself. Any head_dim.

    Fields:
        bits: width of a code, 1 to 8; another raises ConfigError.
        layers: the layers whose cache is quantized.
        norm_correction: stretch the decoded direction to length 1 before the norm is multiplied
            back, vLLM's ``nc``; costs no storage.
        seed: of the rotation, one for all layers and heads.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    layers: Collection[int]
    norm_correction: bool = False
    seed: int = 0
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(keys)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(values)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 16 / D``; sinks and recent tokens at 16."""
        allocated = uniform.allocated_bytes(
            head_dim, bits=self.bits, group=head_dim, metadata=NORM_BYTES
        )
        return uniform.with_exact_tokens(8 * allocated / head_dim, self, tokens=tokens)

    def _round_trip(self, vectors: Tensor) -> Tensor:
        head_dim = vectors.shape[-1]
        rotation = random_rotation(head_dim, self.seed).to(vectors.device)
        entries = codebook(head_dim, self.bits).to(vectors.device)
        norm = vectors.norm(dim=-1, keepdim=True)
        # A vector of zeros has no direction: whatever it decodes to, norm 0 takes it back.
        direction = (vectors / norm.masked_fill(norm == 0, 1.0)) @ rotation
        decoded = entries[torch.bucketize(direction, (entries[1:] + entries[:-1]) / 2)]
        if self.norm_correction:
            decoded = decoded / decoded.norm(dim=-1, keepdim=True)
        return decoded @ rotation.mT * norm.half().float()


@lru_cache(maxsize=8)
def random_rotation(head_dim: int, seed: int) -> Tensor:
    """A Haar-random orthogonal matrix, f32 ``[D, D]``."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    # QR is unique, and its first factor Haar, only where the diagonal is positive.
    return (orthogonal * triangular.diagonal().sign()).float()


@lru_cache(maxsize=32)
def codebook(head_dim: int, bits: int) -> Tensor:
    """The Lloyd-Max codebook of a random unit vector's coordinate, f32 ``[2**bits]``, increasing.

    The exact optimum over bins of the density, in place of Lloyd's iterations.
    """
    reach = min(1.0, REACH / head_dim**0.5)
    grid = (torch.arange(GRID, dtype=torch.float64) * 2 + 1) / GRID - 1
    bins = WeightedBins()
    bins.add(grid, (1 - (grid * reach).square()) ** ((head_dim - 3) / 2))
    return fit_codebook(bins, 2**bits) * reach
