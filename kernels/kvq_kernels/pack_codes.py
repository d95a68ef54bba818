"""Kernels that quantize complete pages and pack the codes into words.

They do the f32 operations of ``kvq_formats.pages.encode_keys`` and ``encode_values`` in the same
order. No product is followed by a sum whose rounding it could change, so that it does not matter
whether a compiler fuses the two.

A program owns 16 rows by ``CHANNELS`` channels of every subset of a page and head, which is all
that goes into its words (``kvq_formats.packing``): codes never move between programs. What could
become an outlier goes to scratch for ``select_outliers``: a magnitude f32 for every number, -1
where it is none, and the finished entry i16 where it is one.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.packing import ROWS as SUBSET_ROWS

PAGE = tl.constexpr(PAGE_TOKENS)
ROWS = tl.constexpr(SUBSET_ROWS)

ROUNDER = tl.constexpr(1.5 * 2**23)
"""A small number that is added to it is rounded to an integer, halves to even, ..."""
ROUNDER_BITS = tl.constexpr(0x4B400000)
"""... which is then how far the sum's bits are above these."""

SPARE_BIT = tl.constexpr(0x11111111)


@triton.jit
def _code(z, midpoints, BITS: tl.constexpr):
    code = tl.zeros_like(z).to(tl.int32)
    for boundary in tl.static_range((1 << BITS) - 1):
        code += (z > tl.load(midpoints + boundary)).to(tl.int32)
    return code


@triton.jit
def _entry(residual, outlier_step, index, INDEX_BITS: tl.constexpr):
    """What ``kvq_formats.outliers`` stores of a residual f32: i16."""
    span: tl.constexpr = 1 << (15 - INDEX_BITS)
    # Clamped before it is rounded, which is the same because the limits are integers.
    steps = tl.minimum(tl.maximum(tl.div_rn(residual, outlier_step), -span), span - 1)
    steps = (steps + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    return ((steps << INDEX_BITS) | index).to(tl.int16)


@triton.jit
def _placed(code, subset, BITS: tl.constexpr):
    """The code of a plane's subset where the lower neighbour has it in a word of 32 bits."""
    return code << (2 * (subset % 4) + 16 * (subset // 4) if BITS == 2 else 8 * subset)


@triton.jit
def _words(packed, spare, neighbour, group, BITS: tl.constexpr):
    """Words i32 ``[..., F / 2]`` of codes i32 ``[..., F]`` that are placed as lower neighbours."""
    if BITS == 3:
        packed |= ((spare >> group) & SPARE_BIT) << 3
    packed = packed << (8 if BITS == 2 else 4) * neighbour
    lower, upper = tl.split(
        tl.reshape(packed, [packed.shape[0], packed.shape[1] // 2, 2], can_reorder=False)
    )
    return lower | upper


@triton.jit
def pack_key_codes(
    keys,
    center,
    half_range,
    midpoints,
    decode_entries,
    words,
    magnitudes,
    entries,
    stride_head,
    stride_token,
    outlier_step,
    H: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    SHAPED: tl.constexpr,
):
    """Codes of keys ``[H, P * 256, D]``. Grid: ``(P * H, blocks of CHANNELS)``.

    Args:
        keys: any float dtype, its last axis contiguous; with SHAPED their targets f32
            ``[P, H, D, 256]`` (``shape_kernel.shape_errors``), which are normalised already.
        center, half_range: f32 ``[H, D]``.
        midpoints, decode_entries: f32 ``[N - 1]`` and ``[N]``.
        words: out, i32 ``[P, H, bits, 16, D / 2]``.
        magnitudes, entries: out, f32 and i16 ``[P, H, 256, D]``; not touched without OUTLIERS.
    """
    # 64 bits: a long text's keys have more than 2**31 numbers.
    pool = tl.program_id(0).to(tl.int64)
    page, head = pool // H, pool % H
    row = tl.arange(0, ROWS)[:, None]
    pair = tl.program_id(1) * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)[None, :]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < D
    middle = tl.load(center + head * D + channel, mask=inside, other=0.0)
    scale = tl.load(half_range + head * D + channel, mask=inside, other=1.0)
    if SHAPED:
        keys += pool * (D * PAGE)
    else:
        keys += head * stride_head + page * PAGE * stride_token
    words += pool * (BITS * ROWS * D // 2)
    if OUTLIERS:
        magnitudes += pool * (PAGE * D)
        entries += pool * (PAGE * D)

    SUBSETS: tl.constexpr = 8 if BITS == 2 else 4
    GROUPS: tl.constexpr = 16 // SUBSETS
    spare = tl.zeros([ROWS, CHANNELS], tl.int32)
    for step in range(GROUPS):
        # 3 bits: the fourth group comes first, because its bits go into the planes of the others.
        group = (step + GROUPS - 1) % GROUPS if BITS == 3 else step
        packed = tl.zeros([ROWS, CHANNELS], tl.int32)
        for subset in range(SUBSETS):
            token = (group * SUBSETS + subset) * ROWS + row
            if SHAPED:
                z = tl.load(keys + channel * PAGE + token, mask=inside, other=0.0)
            else:
                x = tl.load(keys + token * stride_token + channel, mask=inside, other=0.0)
                z = tl.div_rn(x.to(tl.float32) - middle, scale)
            code = _code(z, midpoints, BITS)
            packed |= _placed(code, subset, BITS)
            if OUTLIERS:
                residual = z - tl.load(decode_entries + code)
                is_outlier = tl.abs(z) > 1.0
                magnitude = tl.where(is_outlier, tl.abs(residual) * scale, -1.0)
                entry = _entry(residual, outlier_step, channel, INDEX_BITS)
                tl.store(magnitudes + token * D + channel, magnitude, mask=inside)
                tl.store(entries + token * D + channel, entry, mask=inside & is_outlier)
        if BITS == 3:
            spare = tl.where(step == 0, packed, spare)
        word = _words(packed, spare, channel % 2, group, BITS)
        plane = words + group * (ROWS * D // 2) + row * (D // 2)
        tl.store(plane + pair, word, mask=(pair < D // 2) & (group < BITS))


@triton.jit
def pack_value_codes(
    values,
    scales,
    bounds,
    places,
    midpoints,
    decode_entries,
    words,
    magnitudes,
    entries,
    shaped,
    stride_head,
    stride_token,
    outlier_step,
    H: tl.constexpr,
    D: tl.constexpr,
    SHARING: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    SHAPED: tl.constexpr,
):
    """Codes of values ``[H, P * 256, D]``. Grid: ``(P * H, blocks of CHANNELS)``.

    Args:
        values: any float dtype, its last axis contiguous.
        scales, bounds, places: what ``value_scales.value_scales`` wrote.
        midpoints, decode_entries: f32 ``[N - 1]`` and ``[N]``.
        words: out, i32 ``[P, H, bits, D, 8]``.
        magnitudes, entries: out, f32 and i16 ``[P, H, D, 256]``; not touched without OUTLIERS.
        shaped: with SHAPED the values' targets f32 ``[P, H, D, 256]``
            (``shape_kernel.shape_errors``).
        SHARING: heads that share a scale.
    """
    pool = tl.program_id(0).to(tl.int64)
    page, head = pool // H, pool % H
    row = tl.arange(0, ROWS)[None, :]
    pair = tl.arange(0, ROWS // 2)[None, :]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    place = (head % SHARING).to(tl.int32) * D + channel
    inside = channel < D
    values += head * stride_head + page * PAGE * stride_token
    if SHAPED:
        shaped += pool * (D * PAGE)
    of_token = (page * (H // SHARING) + head // SHARING) * (PAGE * 2)
    scales += of_token
    words += pool * (BITS * D * ROWS // 2)
    if OUTLIERS:
        bounds += of_token
        places += of_token
        magnitudes += pool * (D * PAGE)
        entries += pool * (D * PAGE)

    SUBSETS: tl.constexpr = 8 if BITS == 2 else 4
    GROUPS: tl.constexpr = 16 // SUBSETS
    spare = tl.zeros([CHANNELS, ROWS], tl.int32)
    for step in range(GROUPS):
        group = (step + GROUPS - 1) % GROUPS if BITS == 3 else step
        packed = tl.zeros([CHANNELS, ROWS], tl.int32)
        for subset in range(SUBSETS):
            token = (group * SUBSETS + subset) * ROWS + row
            x = tl.load(values + token * stride_token + channel, mask=inside, other=0.0)
            x = x.to(tl.float32)
            scale = tl.load(scales + 2 * token).to(tl.float32)
            if SHAPED:
                z = tl.load(shaped + channel * PAGE + token, mask=inside, other=0.0)
            else:
                z = tl.div_rn(x - tl.load(scales + 2 * token + 1).to(tl.float32), scale)
            code = _code(z, midpoints, BITS)
            packed |= _placed(code, subset, BITS)
            if OUTLIERS:
                residual = z - tl.load(decode_entries + code)
                lower, upper = tl.load(bounds + 2 * token), tl.load(bounds + 2 * token + 1)
                first, last = tl.load(places + 2 * token), tl.load(places + 2 * token + 1)
                is_outlier = (x < lower) | ((x == lower) & (place < first))
                is_outlier |= (x > upper) | ((x == upper) & (place > last))
                magnitude = tl.where(is_outlier, tl.abs(residual) * scale, -1.0)
                entry = _entry(residual, outlier_step, token, INDEX_BITS)
                tl.store(magnitudes + channel * PAGE + token, magnitude, mask=inside)
                tl.store(entries + channel * PAGE + token, entry, mask=inside & is_outlier)
        if BITS == 3:
            spare = tl.where(step == 0, packed, spare)
        word = _words(packed, spare, row % 2, group, BITS)
        plane = words + group * (D * ROWS // 2) + channel * (ROWS // 2)
        tl.store(plane + pair, word, mask=inside & (group < BITS))
