"""Two classes of tokens, wide codes and narrow ones, told apart by the attention they are paid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_formats.errors import ConfigError, KVQError

QUERY_BLOCK = 256
"""Queries whose attention is held at a time."""


def attention_mass(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """Attention that the queries at ``places`` pay to each token, summed; f32 ``[H, T]``.

    Args:
        queries: f32 ``[HQ, T, D]`` after RoPE. A key/value head's is the mean over its query heads.
        keys: f32 ``[H, T, D]`` after RoPE.
        places: int64 ``[P]``, which queries; one may occur again and counts again.
    """
    num_kv_heads, tokens, head_dim = keys.shape
    mass = torch.zeros(num_kv_heads, tokens, device=keys.device)
    order = torch.arange(tokens, device=keys.device)
    for block in places.split(QUERY_BLOCK):
        asked = queries[:, block].unflatten(0, (num_kv_heads, -1)) * head_dim**-0.5
        scores = asked @ keys[:, None].mT
        scores = scores.masked_fill(order > block[:, None], float("-inf"))
        mass += scores.softmax(dim=-1).mean(dim=1).sum(dim=1)
    return mass


def class_sizes(tokens: int, fraction: float) -> tuple[int, int]:
    """How many of ``tokens`` are salient and how many are not, the latter rounded down."""
    others = int((1 - fraction) * tokens)
    return tokens - others, others


def salient_tokens(saliency: Tensor, fraction: float) -> Tensor:
    """Bool ``[H, T]``: each head's tokens of largest ``saliency`` ``[H, T]``, ties to the first."""
    count, _ = class_sizes(saliency.shape[-1], fraction)
    chosen = saliency.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(saliency, dtype=torch.bool).scatter(-1, chosen, True)


def by_class(
    vectors: Tensor, salient: Tensor, quantize: Callable[[Tensor, int], Tensor], *, bits: list[int]
) -> Tensor:
    """Quantize both classes by themselves.

    Args:
        vectors: f32 ``[H, T, D]``.
        salient: bool ``[H, T]``, as many of each head.
        quantize: maps f32 ``[H, n, D]``, one class of each head in order, and the width of its
            codes to what they decode to.
        bits: width for salient tokens, width for the others.

    Returns: f32 ``[H, T, D]``.
    """
    decoded = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    for chosen, width in zip((salient, ~salient), bits, strict=True):
        count = int(chosen[0].sum())
        if count:
            members = vectors[chosen].unflatten(0, (len(vectors), count))
            decoded[chosen] = quantize(members, width).flatten(0, 1)
    return decoded


def code_bits(bits: list[int], fraction: float, head_dim: int, *, tokens: int | None) -> float:
    """Mean width of a code at ``tokens`` coded tokens, and the class of a token.

    That is one bit a token and head, which its key and its value share.
    """
    salient, others = (fraction, 1 - fraction) if tokens is None else class_sizes(tokens, fraction)
    return (salient * bits[0] + others * bits[1]) / (salient + others) + 1 / (2 * head_dim)


def check_options(bits: int, low_bits: int, fraction: float) -> None:
    """Raise ConfigError for widths outside 1 to 8, and a share of tokens outside 0 to 1."""
    for width in (bits, low_bits):
        uniform.check_options(bits=width)
    if not 0 <= fraction <= 1:
        raise ConfigError(
            f"salient_fraction is {fraction}; expected 0 to 1.", hint="salient_fraction=0.6"
        )


def queries_missing(method: str) -> KVQError:
    """What a method raises that is asked for keys or values alone."""
    return KVQError(
        f"{method} tells salient tokens by their queries, but is given none.",
        hint="call decoded_pair(layer_idx, queries, keys, values)",
    )
