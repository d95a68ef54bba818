"""MiKV: tokens that have gathered most attention keep wide codes, those H2O would drop narrow ones.

Yang et al., "No Token Left Behind", arXiv 2402.18096; no public code was found.

- Importance of a token, a key/value head at a time: the attention that all queries pay to it,
  summed (H2O's heavy hitters, the policy that the paper builds on).
- Codes (section 3.1): uniform, a token and head to one scale and zero, both fp16.
- Dynamic outlier awareness (section 3.2): a channel of keys is multiplied by ``b = sqrt(max|q| /
  max|k|)`` of the prefill before quantization, and its queries divided by it, which dividing the
  decoded keys amounts to. Both classes of keys go through it, as both meet the same queries; in a
  key/value head with several query heads the maximum is over all of them. Values have none.

The paper keeps important tokens at several widths and shares. Here they are 60 % at 4 bits, the
others at 2: ``zipcache.ZipCache``'s split, so that both spend as many bits on codes.

Importance and balancers are taken over the whole text, later queries included, which favours this
method. Summed attention favours early tokens, as published. Attention paid to sinks is not seen,
since they are not handed over. A class is counted as one bit a token and head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvq_evaluation.baselines import saliency, uniform


@dataclass(frozen=True)
class MiKV:
    """Keys after RoPE and values, two widths of codes. Any head_dim.

    Fields:
        layers: the layers whose cache is quantized.
        bits, low_bits: widths for important tokens and for others, 1 to 8; another: ConfigError.
        salient_fraction: share of important tokens, 0 to 1; another raises ConfigError.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: always True, queries being compared with keys.
    """

    layers: Collection[int]
    bits: int = 4
    low_bits: int = 2
    salient_fraction: float = 0.6
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        saliency.check_options(self.bits, self.low_bits, self.salient_fraction)

    def decoded_pair(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What f32 ``[H, T, D]`` decode to, by queries f32 ``[HQ, T, D]``, all after RoPE."""
        if keys.shape[1] == 0:
            return keys, values
        everyone = torch.arange(keys.shape[1], device=keys.device)
        importance = saliency.attention_mass(queries, keys, everyone)
        important = saliency.salient_tokens(importance, self.salient_fraction)
        widths = [self.bits, self.low_bits]
        balancer = channel_balancer(queries, keys)
        balanced = saliency.by_class(keys * balancer, important, by_token, bits=widths)
        return balanced / balancer, saliency.by_class(values, important, by_token, bits=widths)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """Raises KVQError: classes depend on queries."""
        raise saliency.queries_missing("MiKV")

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """Raises KVQError: classes depend on queries."""
        raise saliency.queries_missing("MiKV")

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """Codes, classes, ``32 / D``; 16 bits for all of a text's keys in a channel."""
        coded_tokens = None if tokens is None else uniform.coded_tokens(self, tokens)
        widths = [self.bits, self.low_bits]
        coded = saliency.code_bits(widths, self.salient_fraction, head_dim, tokens=coded_tokens)
        coded += 8 * uniform.GROUP_BYTES / head_dim
        if coded_tokens is not None:
            coded += 16 / coded_tokens / 2
        return uniform.with_exact_tokens(coded, self, tokens=tokens)


def channel_balancer(queries: Tensor, keys: Tensor) -> Tensor:
    """``sqrt(max|q| / max|k|)`` in fp16; queries f32 ``[HQ, T, D]``, keys ``[H, T, D]``.

    Returns: f32 ``[H, 1, D]``, 1 in a channel that is zero in all queries or all keys.
    """
    asked = queries.abs().amax(dim=1).unflatten(0, (len(keys), -1)).amax(dim=1)
    held = keys.abs().amax(dim=1)
    balancer = (asked / held).sqrt().half().float()
    usable = balancer.isfinite() & (balancer > 0)
    return torch.where(usable, balancer, 1.0)[:, None]


def by_token(vectors: Tensor, bits: int) -> Tensor:
    """Uniform codes of f32 ``[H, n, D]``, each token's head by itself."""
    return uniform.round_trip(vectors, bits=bits)
