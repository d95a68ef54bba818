"""Decode attention over bf16 keys and values in Triton: what packed decoding is measured against.

Built as ``kvq_kernels.decode``: one program a run of tokens, key/value head and row, query heads of
a group on the short side of a matrix instruction so that a tile is read once for all of them, a
running softmax in units of ``exp2``, and the same kernel that merges the runs. What differs is what
is read. Keys are rotated already, as a cache of transformers holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.availability import interprets
from kvq_kernels.decode_merge import merge_splits
from kvq_kernels.launch import group_tile, multiprocessors
from kvq_kernels.workspace import Workspace

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut and launched.

    Fields:
        tile: tokens that are read at a time.
        waves: programs a multiprocessor that the step is cut into, if there are tiles for them.
    """

    tile: int
    num_warps: int
    num_stages: int
    waves: int


CUTS = tuple(
    Cut(tile, num_warps, num_stages, waves)
    for tile, num_warps, num_stages in ((64, 4, 3), (128, 4, 2), (128, 8, 3))
    for waves in (2, 4)
)
"""What is tried; the fastest counts."""


@dataclass
class Bf16Decode:
    """One launch configuration and its buffers, which one caller at a time may use."""

    cut: Cut
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Attention of one query a row.

        Args:
            query: ``[B, HQ, D]``; D is a power of two.
            keys, values: ``[B, H, T, D]``, channels side by side.
            lengths: i32 ``[B]``, tokens of each row.

        Returns: f32 ``[B, HQ, D]``.
        """
        B, HQ, D = query.shape
        H, T = keys.shape[1:3]
        G = HQ // H
        device, cut = query.device, self.cut
        room = max(1, cut.waves * multiprocessors(device) // (B * H))
        splits = min(room, triton.cdiv(T, cut.tile))

        def take(name: str, *shape: int) -> Tensor:
            return self.workspace.take(name, shape, torch.float32, device)

        split_out = take("out", B, H, splits, G, D)
        split_max = take("max", B, H, splits, G)
        split_sum = take("sum", B, H, splits, G)
        bf16_splits[(splits, H, B)](
            query.contiguous(),
            keys,
            values,
            lengths,
            split_out,
            split_max,
            split_sum,
            *keys.stride()[:3],
            *values.stride()[:3],
            D**-0.5 * LOG2_E,
            H=H,
            G=G,
            N=group_tile(G, device=device),
            D=D,
            TILE=cut.tile,
            WIDE=interprets(),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )
        output = torch.empty(B, HQ, D, dtype=torch.float32, device=device)
        merge_splits[(HQ, B)](
            split_out,
            split_max,
            split_sum,
            output,
            output,
            splits,
            HQ=HQ,
            G=G,
            D=D,
            D_TILE=D,
            SINK_LOGITS=False,
            num_warps=4,
        )
        return output


@triton.jit
def bf16_splits(
    query,
    keys,
    values,
    lengths,
    split_out,
    split_max,
    split_sum,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    score_scale,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program ``(split, h, b)``; writes what ``merge_splits`` reads.

    WIDE multiplies in f32: the interpreter cannot multiply bf16.
    """
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    tokens = tl.load(lengths + batch)
    # Whole tiles, so that only the last one of a row has tokens masked.
    each = tl.cdiv(tl.cdiv(tokens, TILE), splits) * TILE
    start = split * each
    stop = tl.minimum(start + each, tokens)
    channel = tl.arange(0, D)
    group_head = tl.arange(0, N)
    valid = group_head < G
    keys += batch.to(tl.int64) * key_batch_stride + head.to(tl.int64) * key_head_stride
    values += batch.to(tl.int64) * value_batch_stride + head.to(tl.int64) * value_head_stride
    asked = tl.load(
        query + ((batch * H + head) * G + group_head)[None, :] * D + channel[:, None],
        mask=valid[None, :],
        other=0.0,
    )
    if WIDE:
        asked = asked.to(tl.float32)
    largest = tl.full([N], -float("inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    sums = tl.zeros([D, N], tl.float32)
    for first in range(start, stop, TILE):
        token = first + tl.arange(0, TILE)
        held = token < stop
        key = tl.load(
            keys + token.to(tl.int64)[:, None] * key_token_stride + channel[None, :],
            mask=held[:, None],
            other=0.0,
        )
        value = tl.load(
            values + token.to(tl.int64)[:, None] * value_token_stride + channel[None, :],
            mask=held[:, None],
            other=0.0,
        )
        if WIDE:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(key, asked) * score_scale
        scores = tl.where(held[:, None], scores, -float("inf"))
        merged = tl.maximum(largest, tl.max(scores, axis=0))
        weight = tl.exp2(scores - merged[None, :])
        decay = tl.exp2(largest - merged)
        total = total * decay + tl.sum(weight, axis=0)
        sums = sums * decay[None, :] + tl.dot(tl.trans(value), weight.to(value.dtype))
        largest = merged
    place = ((batch * H + head).to(tl.int64) * splits + split) * G + group_head
    tl.store(split_max + place, largest, mask=valid)
    tl.store(split_sum + place, total, mask=valid)
    tl.store(split_out + place[None, :] * D + channel[:, None], sums, mask=valid[None, :])
