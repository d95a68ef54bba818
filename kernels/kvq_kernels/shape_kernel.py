"""Kernel that makes the targets of error feedback: ``kvq_formats.feedback.shape_errors``.

It runs before codes are packed. A program holds a few tokens of a head in registers, its channels
in the order that they are rounded in, and goes through them one by one: round, take the error, add
its share to all channels that come later. It does the f32 operations of the specification in the
same order; products and sums must not be fused (``enable_fp_fusion=False`` at the launch).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.pack_codes import _code

PAGE = tl.constexpr(PAGE_TOKENS)

SHAPE_ENTRIES = 4096
"""Numbers that a program holds, 32 a thread, and as many targets."""

SHAPE_WARPS = 4


@triton.jit
def shape_errors(
    numbers,
    center,
    half_range,
    scales,
    bounds,
    places,
    midpoints,
    decode_entries,
    order,
    gains,
    shaped,
    stride_head,
    stride_token,
    H: tl.constexpr,
    D: tl.constexpr,
    SHARING: tl.constexpr,
    BITS: tl.constexpr,
    KEYS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Targets of keys or of values. Grid: ``(P * H, 256 / TOKENS)``.

    Args:
        numbers: ``[H, P * 256, D]``, any float dtype, its last axis contiguous.
        center, half_range: f32 ``[H, D]``, of keys.
        scales, bounds, places: what ``value_scales.value_scales`` wrote, of values.
        midpoints, decode_entries: f32 ``[N - 1]`` and ``[N]``.
        order: i16 ``[H, D]``.
        gains: f16 ``[H, D * (D - 1) / 2]``.
        shaped: out, f32 ``[H, P * 256, D]``.
        SHARING: heads that share a scale of values.
        WIDTH: a power of two, at least D.
    """
    pool = tl.program_id(0).to(tl.int64)
    page, head = pool // H, pool % H
    place = tl.arange(0, WIDTH)[None, :]
    inside = place < D
    channel = tl.load(order + head * D + place, mask=inside, other=0).to(tl.int32)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    numbers += head * stride_head + page * PAGE * stride_token
    x = tl.load(numbers + token * stride_token + channel, mask=inside, other=0.0).to(tl.float32)
    is_outlier = x != x
    if KEYS:
        middle = tl.load(center + head * D + channel, mask=inside, other=0.0)
        scale = tl.load(half_range + head * D + channel, mask=inside, other=1.0)
    else:
        of_token = (page * (H // SHARING) + head // SHARING) * (PAGE * 2) + 2 * token
        scale = tl.load(scales + of_token).to(tl.float32)
        middle = tl.load(scales + of_token + 1).to(tl.float32)
        if OUTLIERS:
            lower, upper = tl.load(bounds + of_token), tl.load(bounds + of_token + 1)
            first, last = tl.load(places + of_token), tl.load(places + of_token + 1)
            of_vector = (head % SHARING).to(tl.int32) * D + channel
            is_outlier = (x < lower) | ((x == lower) & (of_vector < first))
            is_outlier |= (x > upper) | ((x == upper) & (of_vector > last))
    exact = tl.div_rn(x - middle, scale)
    targets = exact
    gains += head * (D * (D - 1) // 2)
    for i in range(D):
        chosen = place == i
        target = tl.sum(tl.where(chosen, targets, 0.0), axis=1)
        code = _code(target, midpoints, BITS)
        decoded = tl.load(decode_entries + code)
        if OUTLIERS:
            if KEYS:
                stored = tl.abs(target) > 1.0
            else:
                stored = tl.sum((chosen & is_outlier).to(tl.int32), axis=1) > 0
            decoded = tl.where(stored, target, decoded)
        error = tl.sum(tl.where(chosen, exact, 0.0), axis=1) - decoded
        later = (place > i) & inside
        gain = tl.load(gains + (place - i - 1), mask=later, other=0.0).to(tl.float32)
        targets = tl.where(later, targets + gain * error[:, None], targets)
        gains += D - 1 - i
    shaped += (head * (tl.num_programs(0) // H) + page) * (PAGE * D)
    tl.store(shaped + token * D + channel, targets, mask=inside)
