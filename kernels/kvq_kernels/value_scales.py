"""Kernel that finds the range of each token's values and which of them are outliers.

What ``kvq_formats.pages.value_thresholds`` does by sorting. Here the numbers that a range ends with
are found by halving the space of their bits, then that of their places among equal ones: every step
only counts, so that a token's numbers stay in registers.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.pages import HALF_LARGEST, HALF_SMALLEST

PAGE = tl.constexpr(PAGE_TOKENS)
LARGEST_SCALE = tl.constexpr(HALF_LARGEST)
SMALLEST_SCALE = tl.constexpr(HALF_SMALLEST)

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _counts(first, second):
    """Rows' counts of two conditions in one i32 each, 16 bits a count; a row has up to 2**15."""
    return tl.sum(first.to(tl.int32) + (second.to(tl.int32) << 16), axis=1)[:, None]


@triton.jit
def value_scales(
    values,
    scales,
    bounds,
    places,
    stride_head,
    stride_token,
    D: tl.constexpr,
    SHARING: tl.constexpr,
    PER_SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACE_BITS: tl.constexpr,
    LOW_BIT: tl.constexpr,
):
    """Half-range, centre and outliers of tokens' vectors. Grid: ``(P * 256 / TOKENS, S)``.

    Args:
        values: ``[H, P * 256, D]``, any float dtype, its last axis contiguous.
        scales: out, f16 ``[P, S, 256, 2]``, half-range and centre.
        bounds: out, f32 ``[P, S, 256, 2]``, the lowest and highest number that is no outlier.
        places: out, i32 ``[P, S, 256, 2]``, their places among the numbers that share the scale.
            Smaller or larger numbers are outliers, and of equal ones those before the lowest and
            behind the highest.
        SHARING: heads that share a scale.
        PER_SIDE: outliers on each side; 0 leaves bounds and places untouched.
        PLACE_BITS: 2**PLACE_BITS is at least SHARING * D.
        LOW_BIT: bits of an f32 below this one are 0 in every value.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    scale_head = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, 1 << PLACE_BITS)[None, :]
    inside = place < SHARING * D
    head = scale_head * SHARING + place // D
    numbers = values + head * stride_head + token.to(tl.int64) * stride_token + place % D
    x = tl.load(numbers, mask=inside, other=0.0).to(tl.float32)
    # Integers in the order of the numbers; both zeros become 0, because they are equal.
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(inside, tl.where(bits < 0, LOWEST - bits, bits), HIGHEST)

    # Ranks, counted from 0, of the numbers that the range ends with.
    LOWER: tl.constexpr = PER_SIDE
    UPPER: tl.constexpr = SHARING * D - 1 - PER_SIDE
    # The largest integers that no more than LOWER and UPPER numbers are below.
    count = _counts(order < 0, order < 0)
    lower = tl.where((count & 0xFFFF) <= LOWER, 0, LOWEST)
    upper = tl.where((count >> 16) <= UPPER, 0, LOWEST)
    for step in range(31 - LOW_BIT):
        more = 1 << (30 - step)
        count = _counts(order < lower + more, order < upper + more)
        lower = tl.where((count & 0xFFFF) <= LOWER, lower + more, lower)
        upper = tl.where((count >> 16) <= UPPER, upper + more, upper)
    below = _counts(order < lower, order < upper)
    lower_rank, upper_rank = LOWER - (below & 0xFFFF), UPPER - (below >> 16)
    first = tl.zeros([TOKENS, 1], tl.int32)
    last = tl.zeros([TOKENS, 1], tl.int32)
    for step in range(PLACE_BITS):
        more = 1 << (PLACE_BITS - 1 - step)
        is_lower = (order == lower) & (place < first + more)
        is_upper = (order == upper) & (place < last + more)
        count = _counts(is_lower, is_upper)
        first = tl.where((count & 0xFFFF) <= lower_rank, first + more, first)
        last = tl.where((count >> 16) <= upper_rank, last + more, last)

    # Bits of the one number at the place, which has the sign of its zero.
    low = tl.sum(tl.where(place == first, bits, 0), axis=1)[:, None].to(tl.float32, bitcast=True)
    high = tl.sum(tl.where(place == last, bits, 0), axis=1)[:, None].to(tl.float32, bitcast=True)
    # Divided: a product could be fused with the sum, which gives zero another sign.
    high_half, low_half = tl.div_rn(high, 2.0), tl.div_rn(low, 2.0)
    half_range = tl.minimum(high_half - low_half, LARGEST_SCALE).to(tl.float16)
    half_range = tl.maximum(half_range.to(tl.float32), SMALLEST_SCALE).to(tl.float16)
    center = tl.maximum(high_half + low_half, -LARGEST_SCALE)
    center = tl.minimum(center, LARGEST_SCALE).to(tl.float16)
    page, of_page = token // PAGE, token % PAGE
    at = ((page * tl.num_programs(1) + scale_head) * PAGE + of_page) * 2
    tl.store(scales + at, half_range)
    tl.store(scales + at + 1, center)
    if PER_SIDE > 0:
        tl.store(bounds + at, low)
        tl.store(bounds + at + 1, high)
        tl.store(places + at, first)
        tl.store(places + at + 1, last)
