"""The asymmetric uniform quantizer that several baselines share, and what it allocates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvq_formats.errors import ConfigError
from kvq_runtime.evaluation_rule import CacheCodec

GROUP_BYTES = 4
"""An fp16 scale and an fp16 zero beside the codes of a group."""

EXACT_BITS = 16
"""Bits of a number kept in the model's dtype (bf16 or fp16), such as a sink's."""


def round_trip(vectors: Tensor, *, bits: int) -> Tensor:
    """What the codes of f32 ``[..., G]`` decode to, each last axis a group of its own; f32.

    A group keeps its smallest number as the zero and ``(largest - smallest) / (2**bits - 1)`` as
    the scale, both in fp16, so the end points move by an fp16 rounding.
    """
    last_code = 2**bits - 1
    lower, upper = vectors.amin(dim=-1, keepdim=True), vectors.amax(dim=-1, keepdim=True)
    zero = lower.half().float()
    scale = ((upper - lower) / last_code).half().float()
    # A constant group has scale 0: every code decodes to the zero, whatever it is.
    codes = ((vectors - zero) / scale.masked_fill(scale == 0, 1.0)).round().clamp(0, last_code)
    return codes * scale + zero


def by_group(vectors: Tensor, *, group: int, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """``quantize`` on each ``group`` numbers of the last axis; same shape as ``[..., E]``.

    Where ``group`` does not divide E, what is left at the end is a shorter group of its own.
    ``quantize`` maps ``[..., G]`` to the same shape, each last axis by itself.
    """
    whole = vectors.shape[-1] // group * group
    complete = vectors[..., :whole].unflatten(-1, (whole // group, group))
    parts = [quantize(complete).flatten(-2)]
    if whole < vectors.shape[-1]:
        parts.append(quantize(vectors[..., whole:]))
    return torch.cat(parts, dim=-1)


def allocated_bytes(numbers: int, *, bits: int, group: int, metadata: int = GROUP_BYTES) -> int:
    """Bytes of ``numbers`` in groups, the last one shorter: whole bytes of codes, and metadata."""
    complete, rest = divmod(numbers, group)
    allocated = complete * (-(-bits * group // 8) + metadata)
    return allocated + (-(-bits * rest // 8) + metadata if rest else 0)


def coded_tokens(codec: CacheCodec, tokens: int) -> int:
    """Tokens of ``tokens`` that are neither sinks nor recent, and 1 where there are none."""
    return max(1, tokens - codec.sink_tokens - codec.recent_tokens)


def with_exact_tokens(coded: float, codec: CacheCodec, *, tokens: int | None) -> float:
    """Bits a number where sinks and recent tokens of ``tokens`` take 16, the others ``coded``.

    Without ``tokens`` the text is taken as endless, so that exact tokens weigh nothing.
    """
    if tokens is None:
        return coded
    share = min(1.0, (codec.sink_tokens + codec.recent_tokens) / tokens)
    return (1 - share) * coded + share * EXACT_BITS


def group_bits(*, bits: int, group: int) -> float:
    """Bits a coded number of a complete group: codes in whole bytes, scale and zero."""
    return 8 * allocated_bytes(group, bits=bits, group=group) / group


def check_options(*, bits: int, group: int | None = None, fewest_bits: int = 1) -> None:
    """Raise ConfigError for a code width beyond 8 bits or an empty group."""
    if not fewest_bits <= bits <= 8:
        raise ConfigError(
            f"bits is {bits}; this baseline has codes of {fewest_bits} to 8 bits.",
            hint=f"bits={max(fewest_bits, 4)}",
        )
    if group is not None and group < 1:
        raise ConfigError(
            f"group is {group}; expected a positive number of cached numbers.", hint="group=32"
        )
