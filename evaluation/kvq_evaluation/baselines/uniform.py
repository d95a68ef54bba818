"""The asymmetric uniform quantizer that several baselines share, and what it allocates."""

from __future__ import annotations

from torch import Tensor

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


def effective_bits(*, bits: int, group: int, sink_tokens: int, tokens: int | None) -> float:
    """Bits a cached number: codes in whole bytes a group, scale and zero, and the sinks.

    Without ``tokens`` the text is taken as endless, so that sinks weigh nothing.
    """
    coded = 8 * (-(-bits * group // 8) + GROUP_BYTES) / group
    if tokens is None:
        return coded
    share = min(1.0, sink_tokens / tokens)
    return (1 - share) * coded + share * EXACT_BITS
