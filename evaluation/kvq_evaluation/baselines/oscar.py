"""OSCAR: rotations fitted to what attention reads, clipping, and two-bit codes.

Zhou et al. 2026, arXiv 2605.17757. The steps are those of the authors' code, none is reconstructed
(FutureMLS-Lab/OSCAR, ``rotation/compute_kv_rotation.py`` with ``qqt_sst`` and ``r_h_pbr``, and
``QuantKernel/oscar_rotation_clip_int2_kv.py``):

- target of keys: the covariance of the queries that read them, ``Q^T Q``; of values: ``V^T diag(w)
  V`` with ``w_t = k_t Q^T Q k_t^T`` scaled to a mean of 1; keys and queries after RoPE; averaged
  over a layer's key/value heads, or each head by itself (``per_head``, their later file format 2);
- rotation ``U H P``: eigenvectors by growing eigenvalue, Hadamard, and a bit-reversed order of the
  columns by shrinking eigenvalue, which deals them out to groups;
- each rotated vector's entries are held to its ``int(ratio * D)``-th smallest magnitude, counted
  from 0: ratio 0.96 for keys, 0.92 for values in their recipes; then uniform codes, groups of 128.

Their windows of 64 sinks and 256 recent tokens are ``sink_tokens`` and ``recent_tokens``. Scale and
zero take 16 bits each, which meets the published 2.28 bits at 131,072 tokens. Their server's
default is f32 for both, 2.5 bits before windows. Its optional Lloyd-Max codes are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_evaluation.baselines.hadamard_int import hadamard
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError

KEY_CLIP, VALUE_CLIP = 0.96, 0.92


@dataclass(frozen=True)
class Oscar:
    """Keys after RoPE and values, each token's head rotated and clipped. Use ``calibrated``.

    Fields:
        bits: width of a code, 1 to 8; another raises ConfigError.
        key_rotations, value_rotations: each quantized layer's, f32 ``[1, D, D]`` or ``[H, D, D]``.
        group: channels that share a scale and zero; a shorter head is one group.
        key_clip, value_clip: share of a vector's entries that keep their size, above 0; 1 for all.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    key_rotations: Mapping[int, Tensor]
    value_rotations: Mapping[int, Tensor]
    group: int = 128
    key_clip: float = KEY_CLIP
    value_clip: float = VALUE_CLIP
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, group=self.group)
        for name, ratio in (("key_clip", self.key_clip), ("value_clip", self.value_clip)):
            if not 0 < ratio <= 1:
                raise ConfigError(f"{name} is {ratio}; expected above 0, at most 1.")

    @classmethod
    def calibrated(
        cls,
        samples: Mapping[int, LayerSamples],
        *,
        bits: int = 2,
        group: int = 128,
        per_head: bool = False,
        key_clip: float = KEY_CLIP,
        value_clip: float = VALUE_CLIP,
        sink_tokens: int = 1,
        recent_tokens: int = 0,
    ) -> Self:
        """Fit every layer's rotations; UnsupportedModelError for a head_dim not a power of two."""
        rotations: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for layer_idx, layer in samples.items():
            for fitted, target in zip(rotations, targets(layer), strict=True):
                shared = target if per_head else target.mean(0, keepdim=True)
                fitted[layer_idx] = rotation(shared)
        return cls(bits, *rotations, group, key_clip, value_clip, sink_tokens, recent_tokens)

    @property
    def layers(self) -> Collection[int]:
        """The layers that were calibrated."""
        return self.key_rotations.keys()

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(keys, self.key_rotations[layer_idx], self.key_clip)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._round_trip(values, self.value_rotations[layer_idx], self.value_clip)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 32 / group`` where groups fill the head; sinks and recent tokens at 16."""
        allocated = uniform.allocated_bytes(
            head_dim, bits=self.bits, group=min(self.group, head_dim)
        )
        return uniform.with_exact_tokens(8 * allocated / head_dim, self, tokens=tokens)

    def _round_trip(self, vectors: Tensor, turn: Tensor, ratio: float) -> Tensor:
        turn, head_dim = turn.to(vectors.device), vectors.shape[-1]
        decoded = uniform.by_group(
            clipped(vectors @ turn, ratio),
            group=min(self.group, head_dim),
            quantize=partial(uniform.round_trip, bits=self.bits),
        )
        return decoded @ turn.mT


def targets(layer: LayerSamples) -> tuple[Tensor, Tensor]:
    """What errors of keys and of values are weighed with, both f64 ``[H, D, D]``, symmetric."""
    keys, values = (x.double().transpose(0, 1) for x in (layer.rotated_keys, layer.values))
    # [T, HQ, D] -> [H, T * HQ / H, D]: neighbouring query heads share a key/value head.
    grouped = layer.queries.double().unflatten(1, (len(keys), -1))
    queries = grouped.permute(1, 0, 2, 3).flatten(1, 2)
    of_keys = queries.mT @ queries / queries.shape[1]
    energy = (keys @ of_keys * keys).sum(-1, keepdim=True)
    weight = energy / energy.mean(1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    return of_keys, values.mT @ (weight * values) / values.shape[1]


def rotation(target: Tensor) -> Tensor:
    """``U H P`` of symmetric f64 ``[..., D, D]``, f32 of that shape; columns are directions."""
    head_dim = target.shape[-1]
    mixed = torch.linalg.eigh(target).eigenvectors @ hadamard(head_dim).to(target)
    reversed_bits = torch.zeros(1, dtype=torch.int64)
    while len(reversed_bits) < head_dim:
        reversed_bits = torch.cat([2 * reversed_bits, 2 * reversed_bits + 1])
    # Eigenvalues grow with the column, so the i-th largest is column D - 1 - i.
    return mixed[..., head_dim - 1 - reversed_bits].float()


def clipped(rows: Tensor, ratio: float) -> Tensor:
    """f32 ``[..., D]`` with each row held to its ``int(ratio * D)``-th smallest magnitude."""
    place = min(int(ratio * rows.shape[-1]), rows.shape[-1] - 1)
    limit = rows.abs().sort(dim=-1).values[..., place : place + 1]
    return rows.clamp(-limit, limit)
