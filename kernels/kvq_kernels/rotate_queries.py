"""Rotate the queries of a decode step in one launch, where torch would take seven."""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.kernel_tables import channel_tiles
from kvq_kernels.launch import current
from kvq_kernels.phases import Phases, cos_sin


def rotate_queries(query: Tensor, positions: Tensor, phases: Phases) -> Tensor:
    """Queries of one token a row, rotated in f32 and rounded once.

    Args:
        query: ``[B, HQ, D]``, any float dtype and strides over rows and heads, channels in rotary
            channel order, one after the other.
        positions: i32 ``[B]``.
        phases: of the layer, on the device.

    Returns: ``[B, HQ, D]`` in the dtype of ``query``, contiguous; as ``rotary.rotate`` gives it.
    """
    B, HQ, D = query.shape
    if query.stride(2) != 1:
        query = query.contiguous()
    rotated = torch.empty(B, HQ, D, dtype=query.dtype, device=query.device)
    with current(query.device):
        _rotate[HQ, B](
            query, positions, phases.high, phases.low, rotated, query.stride(0), query.stride(1),
            positions.stride(0), phases.scaling, **channel_tiles(D, phases), num_warps=1,
        )  # fmt: skip
    return rotated


@triton.jit
def _store(place, numbers, mask):
    """Round f32 to the nearest number of the type that ``place`` points to."""
    if place.dtype.element_ty == tl.bfloat16:
        # In integers: the interpreter cuts bits off where devices round.
        bits = numbers.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(place, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(place, numbers.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    query,
    positions,
    phase_high,
    phase_low,
    rotated,
    row_stride,
    head_stride,
    position_stride,
    rotary_scaling,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Program ``(query head, b)``."""
    head, batch = tl.program_id(0), tl.program_id(1)
    query += batch * row_stride + head * head_stride
    rotated += (batch * tl.num_programs(0) + head) * D
    if HALF > 0:
        pair = tl.arange(0, HALF_TILE)
        inside = pair < HALF
        first = tl.load(query + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(query + HALF + pair, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(phase_high + pair, mask=inside, other=0)
        low = tl.load(phase_low + pair, mask=inside, other=0)
        position = tl.load(positions + batch * position_stride)
        cos, sin = cos_sin(tl.full([HALF_TILE], position, tl.int32), high, low)
        cos *= rotary_scaling
        sin *= rotary_scaling
        _store(rotated + pair, first * cos - second * sin, inside)
        _store(rotated + HALF + pair, second * cos + first * sin, inside)
    if REST_TILE > 0:
        place = tl.arange(0, REST_TILE)
        inside = place < D - 2 * HALF
        rest = tl.load(query + 2 * HALF + place, mask=inside, other=0.0)
        tl.store(rotated + 2 * HALF + place, rest, mask=inside)
