"""Kernel that makes the targets of error feedback: ``kvq_formats.feedback.shape_errors``.

It runs before codes are packed. Each thread has tokens of its own, and takes their channels in the
order of rounding, a block of them at a time: what all earlier channels' errors add is summed up in
registers, then the block's channels are rounded one by one. Errors are left in memory for the
blocks behind. It does the f32 operations of the specification in the same order; products and sums
must not be fused (``enable_fp_fusion=False`` at the launch).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.feedback import Feedback
from kvq_kernels.pack_codes import _code

PAGE = tl.constexpr(PAGE_TOKENS)

SHAPE_BLOCK = 8
"""Channels that wait in registers together. Their gains of one error are one load of 16 bytes."""

SHAPE_TOKENS = 128
"""Tokens of a program, 4 a thread, so that these share a gain."""

SHAPE_WARPS = 1

BLOCK = tl.constexpr(SHAPE_BLOCK)


def gain_panels(feedback: Feedback) -> Tensor:
    """Gains as the kernel reads them, f16 ``[H, N]``.

    For each block of channels what the errors of all channels up to its last one give to it, a row
    of ``SHAPE_BLOCK`` gains for each. What lies on the diagonal, below it or beyond D is 0.
    """
    H, D = feedback.order.shape
    width = -(-D // SHAPE_BLOCK) * SHAPE_BLOCK
    square = feedback.gains.new_zeros(H, width, width)
    row, column = torch.triu_indices(D, D, offset=1)
    square[:, row, column] = feedback.gains
    blocks = [slice(first, first + SHAPE_BLOCK) for first in range(0, width, SHAPE_BLOCK)]
    return torch.cat([square[:, : block.stop, block].flatten(1) for block in blocks], dim=1)


@triton.jit
def _row(tile, k):
    """Row k of a tile f32 as ``[1, T]``, bit for bit: of integers all but one are 0 in the sum."""
    chosen = tl.arange(0, BLOCK)[:, None] == k
    bits = tl.where(chosen, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


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
    shift,
    gains,
    errors,
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
):
    """Targets of keys or of values. Grid: ``(P * H, 256 / TOKENS)``.

    Args:
        numbers: ``[H, P * 256, D]``, any float dtype, its last axis contiguous.
        center, half_range: f32 ``[H, D]``, of keys.
        scales, bounds, places: what ``value_scales.value_scales`` wrote, of values.
        midpoints, decode_entries: f32 ``[N - 1]`` and ``[N]``.
        order: i16 ``[H, D]``.
        shift: f32 ``[H, D]``, by channel, not in that order.
        gains: f16 ``[H, N]``, ``gain_panels``.
        errors: scratch, f32 ``[P, H, D, 256]``, channels in order.
        shaped: out, f32 ``[P, H, D, 256]``.
        SHARING: heads that share a scale of values.
    """
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pool = tl.program_id(0).to(tl.int64)
    page, head = pool // H, pool % H
    # Gains are read along one axis, so that a row of them is one load.
    column = tl.arange(0, BLOCK)
    row = column[:, None]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, :]
    numbers += head * stride_head + page * PAGE * stride_token
    gains += head * (BLOCKS * (BLOCKS + 1) // 2 * BLOCK * BLOCK)
    errors += pool * (D * PAGE)
    shaped += pool * (D * PAGE)
    if not KEYS:
        of_token = (page * (H // SHARING) + head // SHARING) * (PAGE * 2) + 2 * token
        scale = tl.load(scales + of_token).to(tl.float32)
        middle = tl.load(scales + of_token + 1).to(tl.float32)
        if OUTLIERS:
            lower, upper = tl.load(bounds + of_token), tl.load(bounds + of_token + 1)
            first, last = tl.load(places + of_token), tl.load(places + of_token + 1)

    for block in range(BLOCKS):
        inside = block * BLOCK + row < D
        channel = tl.load(order + head * D + block * BLOCK + row, mask=inside, other=0)
        channel = channel.to(tl.int32)
        x = tl.load(numbers + (token * stride_token + channel), mask=inside, other=0.0)
        x = x.to(tl.float32)
        if KEYS:
            middle = tl.load(center + head * D + channel)
            scale = tl.load(half_range + head * D + channel)
        exact = tl.div_rn(x - middle, scale) + tl.load(shift + head * D + channel)
        if OUTLIERS and not KEYS:
            of_vector = (head % SHARING).to(tl.int32) * D + channel
            is_outlier = (x < lower) | ((x == lower) & (of_vector < first))
            is_outlier |= (x > upper) | ((x == upper) & (of_vector > last))
            outliers = tl.sum(is_outlier.to(tl.int32) << row, axis=0, keep_dims=True)
        targets = exact
        for earlier in range(block):
            for k in tl.static_range(BLOCK):
                gain = tl.load(gains + k * BLOCK + column).to(tl.float32)[:, None]
                error = tl.load(errors + (earlier * BLOCK + k) * PAGE + token)
                targets += gain * error
            gains += BLOCK * BLOCK
        for k in tl.static_range(BLOCK):
            target = _row(targets, k)
            code = _code(target, midpoints, BITS)
            decoded = tl.load(decode_entries + code)
            if OUTLIERS:
                stored = tl.abs(target) > 1.0 if KEYS else ((outliers >> k) & 1) > 0
                decoded = tl.where(stored, target, decoded)
            error = _row(exact, k) - decoded
            # The last block's errors go nowhere, and its channels may lie beyond D.
            tl.store(errors + (block * BLOCK + k) * PAGE + token, error, mask=block < BLOCKS - 1)
            gain = tl.load(gains + k * BLOCK + column).to(tl.float32)[:, None]
            targets = tl.where(row > k, targets + gain * error, targets)
        gains += BLOCK * BLOCK
        tl.store(shaped + channel * PAGE + token, targets, mask=inside)
        # Each thread reads errors of its own, as long as both tiles of tokens are laid out alike.
        tl.debug_barrier()
