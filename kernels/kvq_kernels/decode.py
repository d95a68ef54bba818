"""Decode attention straight from packed codes: one query a row.

Two side passes and two kernels, without a copy of the cache in any other form and without waiting
for the device (``docs/kernels.md``):

1. ``key_outlier_scores``: what outliers of keys add to the scores, where there are any;
2. ``decode_splits``: pages by runs, and exact tokens by tiles, each with its log-sum-exp;
3. ``value_outlier_sums``: what outliers of values add to each run, where there are any;
4. ``merge_splits``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvq_formats import outliers
from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.decode_merge import merge_splits
from kvq_kernels.decode_outliers import key_outlier_scores, value_outlier_sums
from kvq_kernels.decode_splits import EXACT_TILE, LOG2_E, decode_splits
from kvq_kernels.kernel_tables import KernelTables, channel_tiles
from kvq_kernels.launch import current, exact_precision, group_tile, page_splits, warp_lanes
from kvq_kernels.packed_rows import PackedRows
from kvq_kernels.pair_lookup import GROUP
from kvq_kernels.phases import Phases
from kvq_kernels.workspace import Workspace

MAIN_WARPS = 4
"""64 tokens a group: 16 rows of a matrix instruction a warp."""


def decode(
    query: Tensor,
    rows: PackedRows,
    tables: KernelTables,
    phases: Phases,
    *,
    options: AttentionOptions,
    max_pages: int | None = None,
    splits: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one query a row over all that the row holds.

    Args:
        query: ``[B, HQ, D]``, rotated, any float dtype; its own token is the last of the tail.
        rows: the cache; pages end before the query, so that it reads all of them from codes.
        tables, phases: of the layer, on the device.
        options: scaling and the like.
        max_pages: no row has more; None for the width of the block table.
        splits: programs that share the pages of a row and head; None chooses by the device.
        workspace: where buffers come from.

    Returns: f32 ``[B, HQ, D]``; 0 for a row without tokens.
    """
    B, HQ, D = query.shape
    H = tables.num_kv_heads
    G = HQ // H
    device = query.device
    N = group_tile(G, device=device)
    max_pages = rows.block_table.shape[1] if max_pages is None else max_pages
    if splits is None:
        splits = page_splits(batch=B, num_kv_heads=H, max_pages=max_pages, device=device)
    room = rows.exact_keys.shape[2]
    exact_splits = triton.cdiv(room, EXACT_TILE.value)
    workspace = workspace or Workspace()

    def take(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return workspace.take(name, shape, dtype, device)

    all_splits = exact_splits + splits
    split_out = take("split out", B, H, all_splits, G, D)
    split_max = take("split max", B, H, all_splits, G)
    split_sum = take("split sum", B, H, all_splits, G)
    key_outliers = max_pages > 0 and rows.key_pages.outliers.shape[-1] > 0
    value_outliers = max_pages > 0 and rows.value_pages.outliers.shape[-1] > 0
    tokens = max_pages * PAGE_TOKENS if key_outliers or value_outliers else 0
    weights = take("weights", B, H, tokens, G, dtype=torch.float16)
    group_max = take("group max", B, H, tokens // GROUP.value, G)

    query = query.contiguous()
    # Where a kernel has no use for a tensor it gets one that it does not touch.
    irregular = rows.irregular_positions
    # A soft cap comes between the scores and the units of exp2.
    scale = options.scaling * (1.0 if options.softcap else LOG2_E.value)
    shared: dict[str, Any] = {
        "block_table": rows.block_table,
        "lengths": rows.lengths,
        "table_width": rows.block_table.shape[1],
        "weights": weights,
        "weight_tokens": tokens,
        "H": H,
        "G": G,
    }
    rotary: dict[str, Any] = {
        "base_positions": rows.key_pages.base_positions,
        "irregular_positions": rows.block_table if irregular is None else irregular,
        "phase_high": phases.high,
        "phase_low": phases.low,
        "rotary_scaling": phases.scaling,
        "score_scale": scale,
    }
    small = triton.next_power_of_2(G)
    part = warp_lanes(device)
    tiles = channel_tiles(D, phases)
    scale_heads = rows.value_pages.scales.shape[1]
    output = torch.empty(B, HQ, D, dtype=torch.float32, device=device)
    sinks = options.sink_logits
    with current(device):
        if key_outliers:
            key_outlier_scores[(max_pages * (PAGE_TOKENS // part), H, B)](
                query=query,
                pools=rows.key_pages.outliers,
                counts=rows.key_pages.outlier_counts,
                half_range=tables.outlier_half_range,
                residual_step=tables.parameters.key.outlier_step,
                **shared,
                **rotary,
                N=small,
                D=D,
                HALF=tiles["HALF"],
                CAPACITY=rows.key_pages.outliers.shape[-1],
                CHANNEL_BITS=outliers.channel_bits(D),
                PART=part,
                num_warps=1,
            )
        decode_splits[(all_splits, H, B)](
            query=query,
            key_words=rows.key_pages.words.view(torch.int32),
            key_half_range=tables.half_range,
            key_center=tables.center,
            key_table=tables.key_pairs,
            value_words=rows.value_pages.words.view(torch.int32),
            value_scales=rows.value_pages.scales,
            value_table=tables.value_pairs,
            **shared,
            **rotary,
            offset_cos=phases.offset_cos,
            offset_sin=phases.offset_sin,
            exact_keys=rows.exact_keys,
            exact_values=rows.exact_values,
            exact_positions=rows.exact_positions,
            group_max=group_max,
            split_out=split_out,
            split_max=split_max,
            split_sum=split_sum,
            exact_room=room,
            softcap=options.softcap or 1.0,
            N=N,
            **tiles,
            K_BITS=tables.config.key_bits,
            V_BITS=tables.config.value_bits,
            SCALE_HEADS=scale_heads,
            EXACT_SPLITS=exact_splits,
            SOFTCAP=options.softcap is not None,
            KEY_OUTLIERS=key_outliers,
            VALUE_OUTLIERS=value_outliers,
            IRREGULAR=irregular is not None,
            PRECISION=exact_precision(query.dtype),
            num_warps=MAIN_WARPS,
            num_stages=1,
        )
        if value_outliers:
            value_outlier_sums[(splits * triton.cdiv(D, part), H, B)](
                lists=rows.value_pages.outliers,
                offsets=rows.value_pages.outlier_offsets,
                scales=rows.value_pages.scales,
                **shared,
                group_max=group_max,
                split_out=split_out,
                split_max=split_max,
                residual_step=tables.parameters.value.outlier_step,
                N=small,
                D=D,
                CAPACITY=rows.value_pages.outliers.shape[-1],
                SCALE_HEADS=scale_heads,
                EXACT_SPLITS=exact_splits,
                PART=part,
                num_warps=1,
            )
        merge_splits[(HQ, B)](
            split_out,
            split_max,
            split_sum,
            output if sinks is None else sinks.float().contiguous(),
            output,
            all_splits,
            HQ=HQ,
            G=G,
            D=D,
            D_TILE=tiles["D_TILE"],
            SINK_LOGITS=sinks is not None,
            num_warps=4,
        )
    return output


def scratch_bytes(
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_pages: int,
    exact_room: int,
    outliers: bool,
    device: torch.device,
) -> int:
    """Bytes that ``decode`` holds beside its arguments, its output included.

    Args:
        batch, num_heads, num_kv_heads, head_dim: B, HQ, H, D.
        max_pages: width of the block table.
        exact_room: exact tokens that a row has room for, E.
        outliers: whether keys or values have any.
        device: decides how many programs share a row.

    Counted: of each split an output and two numbers a query head, f32; with outliers a weight in
    f16 for each token and query head, and a number in f32 for each 64 of them.
    """
    splits = page_splits(batch=batch, num_kv_heads=num_kv_heads, max_pages=max_pages, device=device)
    splits += triton.cdiv(exact_room, EXACT_TILE.value)
    heads = batch * num_heads
    tokens = max_pages * PAGE_TOKENS if outliers else 0
    weights = heads * (2 * tokens + 4 * (tokens // GROUP.value))
    return 4 * heads * (splits * (head_dim + 2) + head_dim) + weights
