"""ZipCache: tokens that are attended to more than others keep 4 bits, the others 2.

He et al., NeurIPS 2024, arXiv 2405.14256; code: ThisisBillhe/ZipCache, ``zipcache/models``.

- Saliency of a token, a key/value head at a time: the attention that probes pay to it, over the
  number of probes that may attend to it (the paper's normalized attention score). Probes are the
  last 5 % of tokens and as many random ones before. The code divides by the number of all later
  tokens, probes or not, which marks early tokens down.
- A head's 60 % of largest saliency are salient. Keys are quantized a channel, over all tokens of a
  class; values channel-separably a token: channels are divided by ``sqrt(max|X_i|)``, then a row of
  all heads, each head's n-th token of the class, has one scale and zero, in fp16 (their demo).

Saliency is taken over the whole text, later queries included, and so are the channels' ranges: both
favour this method. Attention paid to sinks is not seen: they are not handed over. The fp16 buffer
of 100 new tokens is ``recent_tokens``. A class, an int64 index there, counts as a bit a head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvq_evaluation.baselines import saliency, uniform

# Of tokens that probe as the most recent ones, and as many again at random.
PROBE_FRACTION = 0.05


@dataclass(frozen=True)
class ZipCache:
    """Keys after RoPE and values, two widths of codes. Any head_dim.

    Fields:
        layers: the layers whose cache is quantized.
        bits, low_bits: widths for salient tokens and for others, 1 to 8; another: ConfigError.
        salient_fraction: share of salient tokens, 0 to 1; another raises ConfigError.
        seed: of the random probes, the same ones in all layers.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: always True, queries being compared with keys.
    """

    layers: Collection[int]
    bits: int = 4
    low_bits: int = 2
    salient_fraction: float = 0.6
    seed: int = 0
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
        places = probes(keys.shape[1], self.seed).to(keys.device)
        score = normalized_attention(queries, keys, places)
        salient = saliency.salient_tokens(score, self.salient_fraction)
        widths = [self.bits, self.low_bits]
        scale = values.abs().amax(dim=1, keepdim=True).sqrt().half().float()
        scale = scale.masked_fill(scale == 0, 1.0)
        decoded_values = saliency.by_class(values / scale, salient, tokenwise, bits=widths) * scale
        return saliency.by_class(keys, salient, channelwise, bits=widths), decoded_values

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """Raises KVQError: classes depend on queries."""
        raise saliency.queries_missing("ZipCache")

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """Raises KVQError: classes depend on queries."""
        raise saliency.queries_missing("ZipCache")

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """Codes, classes, 32 bits a row of values; for all of a text, ranges and channel scales."""
        coded_tokens = None if tokens is None else uniform.coded_tokens(self, tokens)
        widths = [self.bits, self.low_bits]
        coded = saliency.code_bits(widths, self.salient_fraction, head_dim, tokens=coded_tokens)
        coded += 8 * uniform.GROUP_BYTES / (num_kv_heads * head_dim) / 2
        if coded_tokens is not None:
            # A key channel has a scale and zero in each class that has tokens, a value channel 16.
            classes = sum(n > 0 for n in saliency.class_sizes(coded_tokens, self.salient_fraction))
            coded += (8 * uniform.GROUP_BYTES * classes + 16) / coded_tokens / 2
        return uniform.with_exact_tokens(coded, self, tokens=tokens)


def probes(tokens: int, seed: int) -> Tensor:
    """Places of the probe tokens, int64 ``[P]``; the random ones are drawn with replacement."""
    earlier = int(tokens - PROBE_FRACTION * tokens)
    generator = torch.Generator().manual_seed(seed)
    count = int(PROBE_FRACTION * tokens)
    scattered = torch.randint(max(1, earlier), (count,), generator=generator)
    return torch.cat([torch.arange(earlier, tokens), scattered])


def normalized_attention(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """Mean attention of those probes at ``places`` that may attend to a token; f32 ``[H, T]``."""
    # The last token is a probe, so every token has one.
    seen = (places[:, None] >= torch.arange(keys.shape[1], device=keys.device)).sum(dim=0)
    return saliency.attention_mass(queries, keys, places) / seen


def channelwise(keys: Tensor, bits: int) -> Tensor:
    """Uniform codes of f32 ``[H, n, D]``, a channel of a head to one scale and zero."""
    return uniform.round_trip(keys.mT, bits=bits).mT


def tokenwise(values: Tensor, bits: int) -> Tensor:
    """Uniform codes of f32 ``[H, n, D]``, a row of all heads to one scale and zero."""
    rows = uniform.round_trip(values.transpose(0, 1).flatten(1), bits=bits)
    return rows.unflatten(-1, (len(values), -1)).transpose(0, 1)
