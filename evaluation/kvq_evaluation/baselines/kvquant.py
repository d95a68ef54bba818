"""KVQuant as its public code does it, the method that this package is built on.

Hooper et al., NeurIPS 2024, arXiv 2401.18079; where the paper differs from its code
(SqueezeAILab/KVQuant, ``quant/kvquant/simquant_module_quantizer.py``) the code decides:

- keys a channel before RoPE, between the ``f/2`` and ``1 - f/2`` quantiles of the calibration text;
  what lies beyond is an outlier, however many there are in a token, and kept exactly;
- values a token over the layer's whole vector, whose ``int(f/2 * C) + 1`` largest and as many
  smallest are outliers; the range is that of the rest;
- a codebook a layer for keys and one for values, k-means on pooled normalised inliers, weighted
  with the squared gradient alone (the paper's Eq. 7 multiplies it by ``half_range**2``). The exact
  optimum stands for scikit-learn's local one. No Q-Norm, as in the final paper.

Thresholds stay f32: the code's fp16 ones make outliers that it does not count of biased keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from kvq_calibration.kmeans import WeightedBins, fit_codebook
from kvq_calibration.thresholds import ChannelQuantiles, center_and_half_range
from kvq_evaluation.baselines import uniform
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError


@dataclass(frozen=True)
class LayerTables:
    """What a layer is calibrated to: key thresholds f32 ``[C]``, codebooks f32 ``[N]``."""

    key_lower: Tensor
    key_upper: Tensor
    key_codebook: Tensor
    value_codebook: Tensor


@dataclass(frozen=True)
class KVQuant:
    """Non-uniform codes with outliers kept exactly. Make one with ``calibrated``.

    Fields:
        bits: width of a code, 2 to 8; another raises ConfigError.
        tables: what each quantized layer was calibrated to.
        outlier_fraction: share of outliers ``f``, both tails together, below 1/2; 0 for none.
        storage: bits as the deployment code stores ("code") or as the paper counts ("paper").
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``; the paper has one sink.
        rotated_keys: False, keys are quantized before RoPE.
    """

    bits: int
    tables: Mapping[int, LayerTables]
    outlier_fraction: float = 0.01
    storage: Literal["code", "paper"] = "code"
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = False

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, fewest_bits=2)
        if not 0 <= self.outlier_fraction < 0.5:
            raise ConfigError(
                f"outlier_fraction is {self.outlier_fraction}; expected at least 0, below 0.5.",
                hint="outlier_fraction=0.01",
            )
        if self.storage not in ("code", "paper"):
            raise ConfigError(f"storage is {self.storage!r}; expected 'code' or 'paper'.")

    @classmethod
    def calibrated(
        cls,
        samples: Mapping[int, LayerSamples],
        *,
        bits: int,
        outlier_fraction: float = 0.01,
        storage: Literal["code", "paper"] = "code",
        sink_tokens: int = 1,
        recent_tokens: int = 0,
    ) -> Self:
        """Fit every layer of the samples; without sensitivities k-means is not weighted."""
        tables = {}
        for layer_idx, layer in samples.items():
            keys, values = layer.keys.flatten(1), layer.values.flatten(1)
            lower, upper = _quantiles(keys, outlier_fraction)
            # As the code does: at calibration a token's thresholds are quantiles too.
            low, high = (x[:, None] for x in _quantiles(values.T, outlier_fraction))
            tables[layer_idx] = LayerTables(
                key_lower=lower,
                key_upper=upper,
                key_codebook=_codebook(keys, lower, upper, layer.key_sensitivity, bits),
                value_codebook=_codebook(values, low, high, layer.value_sensitivity, bits),
            )
        return cls(bits, tables, outlier_fraction, storage, sink_tokens, recent_tokens)

    @property
    def layers(self) -> Collection[int]:
        """The layers that were calibrated."""
        return self.tables.keys()

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes and outliers of f32 ``[H, T, D]`` decode to."""
        layer, flat = self.tables[layer_idx], keys.transpose(0, 1).flatten(1)
        lower, upper = (x.to(flat.device) for x in (layer.key_lower, layer.key_upper))
        decoded = _nearest(flat, lower, upper, layer.key_codebook)
        if self.outlier_fraction:
            decoded = torch.where((flat < lower) | (flat > upper), flat, decoded)
        return decoded.unflatten(1, (keys.shape[0], -1)).transpose(0, 1).contiguous()

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes and outliers of f32 ``[H, T, D]`` decode to."""
        flat = values.transpose(0, 1).flatten(1)
        ordered, channels = flat.sort(dim=-1)
        n, C = self._outliers_per_side(flat.shape[1]), flat.shape[1]
        codebook = self.tables[layer_idx].value_codebook
        decoded = _nearest(flat, ordered[:, n : n + 1], ordered[:, C - 1 - n : C - n], codebook)
        for tail in (slice(0, n), slice(C - n, C)):
            decoded.scatter_(1, channels[:, tail], ordered[:, tail])
        return decoded.unflatten(1, (values.shape[0], -1)).transpose(0, 1).contiguous()

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """Codes, outliers and what a token keeps for its values; sinks and recent tokens at 16.

        "code" (``deployment/``, ``QuantK`` and ``QuantV``): 32-bit value and index an outlier;
        keys, being uncapped, in rows with an int32 pointer a token and an int32 start every 10
        entries; values in fixed slots, with an f32 codebook a token. Capped keys, in slots as
        values, would give the 3.39, 4.34 and 5.99 times that its code compresses at C = 4096.
        "paper": 16-bit value and index an outlier, fp16 scale and offset a token of values.
        Key outliers count as ``f`` of the text, which holds for text like the calibration text.
        """
        C, f = num_kv_heads * head_dim, self.outlier_fraction
        value_share = 2 * self._outliers_per_side(C) / C
        if self.storage == "code":
            keys = f * (64 + 32 / 10) + (32 / C if f else 0.0)
            values = value_share * 64 + 32 * 2**self.bits / C
        else:
            keys, values = f * 32, value_share * 32 + 32 / C
        codes = 8 * -(-self.bits * C // 8) / C
        return uniform.with_exact_tokens(codes + (keys + values) / 2, self, tokens=tokens)

    def _outliers_per_side(self, channels: int) -> int:
        if not self.outlier_fraction:
            return 0
        return min(int(self.outlier_fraction / 2 * channels) + 1, (channels - 1) // 2)


def _quantiles(columns: Tensor, outlier_fraction: float) -> tuple[Tensor, Tensor]:
    """The ``f/2`` and ``1 - f/2`` quantiles of each column of f32 ``[n, m]``, both ``[m]``."""
    quantiles = ChannelQuantiles(outlier_fraction, total_tokens=len(columns))
    quantiles.add(columns)
    return quantiles.thresholds()


def _codebook(
    flat: Tensor, lower: Tensor, upper: Tensor, sensitivity: Tensor | None, bits: int
) -> Tensor:
    """Entries f32 ``[N]`` for the inliers of f32 ``[T, C]``, weighted with ``[T, H, D]``."""
    center, half_range = center_and_half_range(lower, upper)
    inliers = (flat >= lower) & (flat <= upper)
    bins = WeightedBins()
    weight = None if sensitivity is None else sensitivity.flatten(1)[inliers]
    bins.add(((flat - center) / half_range)[inliers], weight)
    return fit_codebook(bins, 2**bits)


def _nearest(flat: Tensor, lower: Tensor, upper: Tensor, codebook: Tensor) -> Tensor:
    """Each number's nearest entry between its thresholds, f32 ``[T, C]``."""
    entries = codebook.to(flat.device)
    center, half_range = center_and_half_range(lower, upper)
    normalised = ((flat - center) / half_range).contiguous()
    codes = torch.bucketize(normalised, (entries[1:] + entries[:-1]) / 2)
    return entries[codes] * half_range + center
