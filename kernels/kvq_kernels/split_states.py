"""What a split of a decode leaves for the merge (``decode_merge``)."""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_split(
    split_out,
    split_max,
    split_sum,
    line,
    state_out,
    state_max,
    state_sum,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """Keep a split's largest score, its sum of weights, and its weighted values relative to them.

    ``line`` is the number of the split among all rows and heads, times G: f32
    ``[B, H, splits, G]``, twice, and ``[B, H, splits, G, D]``. Scores are in units of ``exp2``;
    ``state_out`` is f32 ``[D_TILE, N]``, the others ``[N]``.
    """
    head = tl.arange(0, state_max.shape[0])
    channel = tl.arange(0, state_out.shape[0])
    valid = head < G
    tl.store(split_max + line + head, state_max, mask=valid)
    tl.store(split_sum + line + head, state_sum, mask=valid)
    tl.store(
        split_out + (line + head)[None, :] * D + channel[:, None],
        state_out,
        mask=valid[None, :] & (channel < D)[:, None],
    )
