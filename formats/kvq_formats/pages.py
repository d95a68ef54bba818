"""Pages: the quantized record of 256 tokens a head, encoded and decoded by the reference.

``encode_keys``/``decode_keys`` and ``encode_values``/``decode_values`` are the specification of the
cache's bytes: kernels are tested against them. A complete page depends on nothing but its own
tokens. The last page of a text may be incomplete: its pool and list then have room pro rata,
rounded up (``docs/method.md``, evaluation rule).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import torch
from torch import Tensor

from kvq_formats import outliers, packing
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.feedback import shape_errors
from kvq_formats.parameters import KeyParameters, ValueParameters

HALF_LARGEST = torch.finfo(torch.float16).max
HALF_SMALLEST = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps


@dataclass(frozen=True)
class KeyPages:
    """Keys of ``P`` pages, before RoPE.

    Fields:
        words: i16 ``[P, H, bits, 16, D]``, packed codes (``packing``).
        outliers: i16 ``[P, H, capacity]``, sorted by token, then channel (``outliers``).
        outlier_counts: u8 ``[P, H, 256]``, entries of each token.
        base_positions: i32 ``[P]``, position of the page's first token.
    """

    words: Tensor
    outliers: Tensor
    outlier_counts: Tensor
    base_positions: Tensor

    @classmethod
    def allocate(
        cls,
        config: KVQConfig,
        *,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Empty pages; on the ``meta`` device they cost nothing and still tell their bytes."""
        P, H, D = num_pages, num_kv_heads, head_dim
        capacity = outliers.key_pool_capacity(config, D)
        counted = PAGE_TOKENS if capacity else 0
        zeros = partial(torch.zeros, device=device)
        return cls(
            words=zeros(P, H, config.key_bits, packing.ROWS, D, dtype=torch.int16),
            outliers=zeros(P, H, capacity, dtype=torch.int16),
            outlier_counts=zeros(P, H, counted, dtype=torch.uint8),
            base_positions=zeros(P, dtype=torch.int32),
        )


@dataclass(frozen=True)
class ValuePages:
    """Values of ``P`` pages.

    Fields:
        words: i16 ``[P, H, bits, D, 16]``, packed codes (``packing``).
        scales: f16 ``[P, S, 256, 2]``, half-range and centre of each token; S is 1 when all heads
            share them, else H.
        outliers: i16 ``[P, H, capacity]``, sorted by channel, then token (``outliers``).
        outlier_offsets: u16 ``[P, H, D + 1]``, where each channel's entries begin and end.
    """

    words: Tensor
    scales: Tensor
    outliers: Tensor
    outlier_offsets: Tensor

    @classmethod
    def allocate(
        cls,
        config: KVQConfig,
        *,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Empty pages; on the ``meta`` device they cost nothing and still tell their bytes."""
        P, H, D = num_pages, num_kv_heads, head_dim
        capacity = outliers.value_list_capacity(config, H, D)
        scales = 1 if config.value_grain == "token" else H
        zeros = partial(torch.zeros, device=device)
        return cls(
            words=zeros(P, H, config.value_bits, D, packing.ROWS, dtype=torch.int16),
            scales=zeros(P, scales, PAGE_TOKENS, 2, dtype=torch.float16),
            outliers=zeros(P, H, capacity, dtype=torch.int16),
            outlier_offsets=zeros(P, H, D + 1 if capacity else 0, dtype=torch.uint16),
        )


def allocated_bytes(pages: KeyPages | ValuePages) -> dict[str, int]:
    """Bytes that each field of the pages takes."""
    return {field.name: getattr(pages, field.name).nbytes for field in fields(pages)}


def _paged(x: Tensor) -> tuple[Tensor, Tensor]:
    """f32 ``[H, T, D]`` -> pages f32 ``[P, H, 256, D]``, zero-filled, and lengths i64 ``[P]``."""
    H, T, D = x.shape
    P = -(-T // PAGE_TOKENS)
    padded = torch.nn.functional.pad(x, (0, 0, 0, P * PAGE_TOKENS - T))
    lengths = torch.full((P,), PAGE_TOKENS, device=x.device)
    if P:
        lengths[-1] = T - (P - 1) * PAGE_TOKENS
    return padded.reshape(H, P, PAGE_TOKENS, D).movedim(0, 1).contiguous(), lengths


def _flat(pages: Tensor, tokens: int) -> Tensor:
    """``[P, H, 256, D]`` -> ``[H, T, D]``."""
    P, H, _, D = pages.shape
    return pages.movedim(0, 1).reshape(H, P * PAGE_TOKENS, D)[:, :tokens]


def _room(capacity: int, lengths: Tensor) -> Tensor:
    return -(-capacity * lengths // PAGE_TOKENS)


def encode_keys(
    keys: Tensor, parameters: KeyParameters, config: KVQConfig, *, first_position: int = 0
) -> KeyPages:
    """Quantize the keys of one row after its sinks, f32 ``[H, T, D]`` before RoPE.

    Entries with ``|z| > 1`` are outliers (KVQuant, section 3.4); a page keeps those with the
    largest residuals in the units of the keys. With error feedback z is the target that
    ``feedback.shape_errors`` makes of it.
    """
    H, _, D = keys.shape
    x, lengths = _paged(keys)
    P = len(lengths)
    capacity = outliers.key_pool_capacity(config, D)
    half_range = parameters.half_range.to(x.device)[:, None, :]
    z = (x - parameters.center.to(x.device)[:, None, :]) / half_range
    if parameters.feedback is not None:
        none = None if capacity else torch.zeros((), dtype=torch.bool, device=x.device)
        z = shape_errors(z, parameters.codebook, parameters.feedback, is_outlier=none)
    codes = parameters.codebook.encode(z)
    tokens = torch.arange(PAGE_TOKENS, device=x.device)
    valid = tokens < lengths[:, None]
    codes = codes * valid[:, None, :, None]
    pages = KeyPages.allocate(config, num_pages=P, num_kv_heads=H, head_dim=D, device=x.device)
    pages.words.copy_(packing.pack_keys(codes, bits=config.key_bits))
    pages.base_positions.copy_(first_position + PAGE_TOKENS * torch.arange(P, device=x.device))
    if capacity == 0 or P == 0:
        return pages

    residual = z - parameters.codebook.decode(codes)
    candidates = (z.abs() > 1) & valid[:, None, :, None]
    kept = outliers.keep_largest(
        (residual.abs() * half_range).flatten(2), candidates.flatten(2), _room(capacity, lengths)
    )
    # A count is one byte: of 256 channels a token keeps at most 255.
    by_token = kept.reshape(P, H, PAGE_TOKENS, D)
    kept = (by_token & (by_token.cumsum(-1) <= torch.iinfo(torch.uint8).max)).flatten(2)
    bits = outliers.channel_bits(D)
    steps = outliers.quantize_residuals(
        residual.flatten(2), step=parameters.outlier_step, index_bits=bits
    )
    channel = torch.arange(D, device=x.device, dtype=torch.int32).repeat(PAGE_TOKENS)
    pages.outliers.copy_(outliers.pack_entries(kept, steps, channel, bits=bits, capacity=capacity))
    pages.outlier_counts.copy_(kept.reshape(P, H, PAGE_TOKENS, D).sum(-1))
    return pages


def decode_keys(pages: KeyPages, parameters: KeyParameters, *, tokens: int) -> Tensor:
    """Decode the first ``tokens`` keys, f32 ``[H, T, D]`` before RoPE."""
    P, H, bits, _, D = pages.words.shape
    normalised = parameters.codebook.decode(packing.unpack_keys(pages.words, bits=bits))
    if pages.outliers.shape[-1]:
        steps, channel = outliers.unpack_entries(pages.outliers, bits=outliers.channel_bits(D))
        # Token of a pool's place i: how many tokens' runs have ended at i.
        ends = pages.outlier_counts.long().cumsum(-1)
        places = torch.arange(pages.outliers.shape[-1], device=ends.device).expand(P, H, -1)
        token = torch.searchsorted(ends, places.contiguous(), right=True)
        used = places < ends[..., -1:]
        where = (token.clamp(max=PAGE_TOKENS - 1) * D + channel).masked_fill(~used, 0)
        residual = (steps * parameters.outlier_step).masked_fill(~used, 0.0)
        normalised = normalised.flatten(2).scatter_add(-1, where, residual)
        normalised = normalised.reshape(P, H, PAGE_TOKENS, D)
    half_range = parameters.half_range.to(normalised.device)[:, None, :]
    decoded = normalised * half_range + parameters.center.to(normalised.device)[:, None, :]
    return _flat(decoded, tokens)


def value_thresholds(vectors: Tensor, *, outliers_per_side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outliers and range of each token's vector, f32 ``[..., size]`` (KVQuant, section 3.4).

    Returns: (half_range f16 ``[..., 1]``, center f16 ``[..., 1]``, is_outlier bool
    ``[..., size]``). The ``outliers_per_side`` largest and smallest entries are outliers; the range
    is that of the rest, rounded to fp16 before any code is chosen. Equal entries go by channel.
    """
    size = vectors.shape[-1]
    n = outliers_per_side
    ordered, order = vectors.sort(dim=-1, stable=True)
    lower, upper = ordered[..., n : n + 1], ordered[..., size - 1 - n : size - n]
    # Halves first: a difference of two large numbers of unlike signs would overflow.
    half_range = (upper / 2 - lower / 2).clamp(max=HALF_LARGEST).half().clamp(min=HALF_SMALLEST)
    center = (upper / 2 + lower / 2).clamp(-HALF_LARGEST, HALF_LARGEST).half()
    place = torch.arange(size, device=vectors.device)
    outside = ((place < n) | (place >= size - n)).expand_as(order)
    is_outlier = torch.zeros_like(outside).scatter(-1, order, outside)
    return half_range, center, is_outlier


def encode_values(values: Tensor, parameters: ValueParameters, config: KVQConfig) -> ValuePages:
    """Quantize the values of one row after its sinks, f32 ``[H, T, D]``.

    Scales and outliers are those of the values as they are; with error feedback codes and residuals
    are of the targets that ``feedback.shape_errors`` makes of them.
    """
    H, _, D = values.shape
    x, lengths = _paged(values)
    P = len(lengths)
    shared = config.value_grain == "token"
    # One vector a scale: [P, S, 256, heads of the scale * D].
    vectors = x.transpose(1, 2).reshape(P, PAGE_TOKENS, 1, H * D).transpose(1, 2) if shared else x
    per_side = outliers.value_outliers_per_side(config, H, D)
    half_range, center, is_outlier = value_thresholds(vectors, outliers_per_side=per_side)
    if shared:
        is_outlier = is_outlier.reshape(P, PAGE_TOKENS, H, D).transpose(1, 2)
    z = (x - center.float()) / half_range.float()
    if parameters.feedback is not None:
        z = shape_errors(z, parameters.codebook, parameters.feedback, is_outlier=is_outlier)
    valid = (torch.arange(PAGE_TOKENS, device=x.device) < lengths[:, None])[:, None, :, None]
    codes = parameters.codebook.encode(z) * valid
    pages = ValuePages.allocate(config, num_pages=P, num_kv_heads=H, head_dim=D, device=x.device)
    pages.words.copy_(packing.pack_values(codes, bits=config.value_bits))
    pages.scales.copy_(torch.cat([half_range, center], dim=-1))
    capacity = pages.outliers.shape[-1]
    if capacity == 0 or P == 0:
        return pages

    residual = z - parameters.codebook.decode(codes)

    def by_channel(t: Tensor) -> Tensor:
        return t.transpose(2, 3).flatten(2)

    kept = outliers.keep_largest(
        by_channel(residual.abs() * half_range.float()),
        by_channel(is_outlier & valid),
        _room(capacity, lengths),
    )
    steps = outliers.quantize_residuals(
        by_channel(residual), step=parameters.outlier_step, index_bits=outliers.TOKEN_BITS
    )
    token = torch.arange(PAGE_TOKENS, device=x.device, dtype=torch.int32).repeat(D)
    pages.outliers.copy_(
        outliers.pack_entries(kept, steps, token, bits=outliers.TOKEN_BITS, capacity=capacity)
    )
    counts = kept.reshape(P, H, D, PAGE_TOKENS).sum(-1)
    ends = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    pages.outlier_offsets.copy_(ends.to(torch.uint16))
    return pages


def decode_values(pages: ValuePages, parameters: ValueParameters, *, tokens: int) -> Tensor:
    """Decode the first ``tokens`` values, f32 ``[H, T, D]``."""
    P, H, bits, D, _ = pages.words.shape
    normalised = parameters.codebook.decode(packing.unpack_values(pages.words, bits=bits))
    if pages.outliers.shape[-1]:
        steps, token = outliers.unpack_entries(pages.outliers, bits=outliers.TOKEN_BITS)
        ends = pages.outlier_offsets.int()[..., 1:].contiguous()
        places = torch.arange(pages.outliers.shape[-1], device=ends.device, dtype=torch.int32)
        places = places.expand(P, H, -1).contiguous()
        channel = torch.searchsorted(ends, places, right=True)
        used = places < ends[..., -1:]
        where = (token * D + channel.clamp(max=D - 1)).masked_fill(~used, 0)
        residual = (steps * parameters.outlier_step).masked_fill(~used, 0.0)
        normalised = normalised.flatten(2).scatter_add(-1, where, residual)
        normalised = normalised.reshape(P, H, PAGE_TOKENS, D)
    half_range, center = pages.scales.float().split(1, dim=-1)
    return _flat(normalised * half_range + center, tokens)
