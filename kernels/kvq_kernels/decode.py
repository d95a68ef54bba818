"""Decode attention straight from packed codes: one query a row.

Four kernels and two side passes, without a copy of the cache in any other form and without waiting
for the device (``docs/kernels.md``):

1. ``turn_queries``: queries, turned back by the base position of each page;
2. ``key_outlier_scores``: what outliers of keys add to the scores, where there are any;
3. ``decode_pages`` or, on the portable path, ``decode_splits``: pages by runs, each with its
   log-sum-exp; ``launch_table`` says which;
4. ``exact_splits``: the same for exact tokens, by tiles;
5. ``value_outlier_sums``: what outliers of values add to each run, where there are any;
6. ``merge_splits``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvq_formats import outliers
from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.decode_exact import EXACT_TILE, exact_splits
from kvq_kernels.decode_merge import merge_splits
from kvq_kernels.decode_outliers import key_outlier_scores, value_outlier_sums
from kvq_kernels.decode_queries import TURN_PAGES, turn_queries
from kvq_kernels.decode_splits import decode_splits
from kvq_kernels.kernel_tables import KernelTables, channel_tiles
from kvq_kernels.launch import (
    architecture,
    current,
    exact_precision,
    group_tile,
    page_splits,
    warp_lanes,
)
from kvq_kernels.launch_table import decode_launch
from kvq_kernels.nvidia.decode_pages import decode_pages
from kvq_kernels.packed_rows import PackedRows
from kvq_kernels.phases import Phases
from kvq_kernels.scores import score_arguments
from kvq_kernels.workspace import Workspace


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
    max_pages = rows.block_table.shape[1] if max_pages is None else max_pages
    sinks, irregular = options.sink_logits, rows.irregular_positions
    main = decode_launch(
        architecture(device),
        bits=(tables.config.key_bits, tables.config.value_bits),
        head_dim=D,
        rotary_dim=2 * len(phases.high),
        group_size=G,
        irregular=irregular is not None,
    )
    if splits is None:
        splits = page_splits(main, batch=B, num_kv_heads=H, max_pages=max_pages, device=device)
    room = rows.exact_keys.shape[2]
    tiles = triton.cdiv(room, EXACT_TILE.value)
    all_splits = tiles + splits
    key_pool, value_list = rows.key_pages.outliers.shape[-1], rows.value_pages.outliers.shape[-1]
    key_outliers, value_outliers = key_pool > 0, value_list > 0
    tokens = max_pages * PAGE_TOKENS if key_outliers or value_outliers else 0
    width = triton.next_power_of_2(G)
    by_head = main.path == "registers"
    by_channel = key_outliers or not by_head
    lanes = warp_lanes(device)
    query = query.contiguous()
    output = torch.empty(B, HQ, D, dtype=torch.float32, device=device)
    workspace = workspace or Workspace()

    def take(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return workspace.take(name, shape, dtype, device)

    # Each kernel takes what it names.
    arguments: dict[str, Any] = {
        "query": query,
        "turned": take("turned", B, H, by_channel * max_pages, D, width, dtype=torch.float16),
        "page_queries": take("by head", B, H, by_head * max_pages, width, D, dtype=torch.float16),
        "sizes": take("sizes", B, H, width),
        "weights": take("weights", B, H, tokens, G, dtype=torch.float16),
        "page_max": take("page max", B, H, max_pages if tokens else 0, G),
        "page_range": take("page range", B, H, max_pages if tokens else 0),
        "split_out": take("split out", B, H, all_splits, G, D),
        "split_max": take("split max", B, H, all_splits, G),
        "split_sum": take("split sum", B, H, all_splits, G),
        "output": output,
        "key_words": rows.key_pages.words.view(torch.int32),
        "key_half_range": tables.half_range,
        "key_center": tables.center,
        "key_table": tables.key_pairs,
        "pools": rows.key_pages.outliers,
        "counts": rows.key_pages.outlier_counts,
        "half_range": tables.outlier_half_range,
        "value_words": rows.value_pages.words.view(torch.int32),
        "value_table": tables.value_pairs,
        "scales": rows.value_pages.scales,
        "lists": rows.value_pages.outliers,
        "offsets": rows.value_pages.outlier_offsets,
        "block_table": rows.block_table,
        "lengths": rows.lengths,
        "base_positions": rows.key_pages.base_positions,
        # Where a kernel has no use for a tensor it gets one that it does not touch.
        "irregular_positions": rows.block_table if irregular is None else irregular,
        "sink_logits": output if sinks is None else sinks.float().contiguous(),
        "phase_high": phases.high,
        "phase_low": phases.low,
        "offset_cos": phases.offset_cos,
        "offset_sin": phases.offset_sin,
        "exact_keys": rows.exact_keys,
        "exact_values": rows.exact_values,
        "exact_positions": rows.exact_positions,
        "table_width": rows.block_table.shape[1],
        "max_pages": max_pages,
        "weight_tokens": tokens,
        "exact_room": room,
        "splits": all_splits,
        **score_arguments(options),
        "rotary_scaling": phases.scaling,
        **channel_tiles(D, phases),
        "HQ": HQ,
        "H": H,
        "G": G,
        "GROUP_WIDTH": width,
        "N": group_tile(G, device=device),
        "K_BITS": tables.config.key_bits,
        "V_BITS": tables.config.value_bits,
        "CHANNEL_BITS": outliers.channel_bits(D),
        "SCALE_HEADS": rows.value_pages.scales.shape[1],
        "EXACT_SPLITS": tiles,
        "PART": lanes,
        "SINK_LOGITS": sinks is not None,
        "KEY_OUTLIERS": key_outliers,
        "VALUE_OUTLIERS": value_outliers,
        "IRREGULAR": irregular is not None,
        "BY_CHANNEL": by_channel,
        "BY_HEAD": by_head,
        "PRECISION": exact_precision(query.dtype),
    }

    def launch(kernel: Any, *grid: int, **how: Any) -> None:
        given = {name: arguments[name] for name in kernel.arg_names if name not in how}
        kernel[grid](**given, **how)

    with current(device):
        if max_pages:
            launch(turn_queries, triton.cdiv(max_pages, TURN_PAGES.value), H, B, num_warps=1)
        if key_outliers and max_pages:
            how = {"CAPACITY": key_pool, "residual_step": tables.parameters.key.outlier_step}
            launch(key_outlier_scores, max_pages, H, B, num_warps=1, **how)
        if main.path == "registers":
            how = {"num_warps": main.warps, **_for_registers(tables, phases, rows)}
            launch(decode_pages, splits, H, B, **how)
        else:
            launch(decode_splits, splits, H, B, num_warps=main.warps, num_stages=1)
        if tiles:
            launch(exact_splits, tiles, H, B, num_warps=4)
        if value_outliers and max_pages:
            how = {"CAPACITY": value_list, "residual_step": tables.parameters.value.outlier_step}
            launch(value_outlier_sums, splits * triton.cdiv(D, lanes), H, B, num_warps=1, **how)
        launch(merge_splits, HQ, B, num_warps=4)
    return output


def _for_registers(tables: KernelTables, phases: Phases, rows: PackedRows) -> dict[str, Any]:
    """What the fast path reads of a layer: two f16 a word."""
    lookups = tables.lookups
    return {
        "key_lookup": lookups.key_lookup,
        "value_lookup": lookups.value_lookup,
        "key_scale": lookups.key_scale.view(torch.int32),
        "key_zero": lookups.key_zero.view(torch.int32),
        "value_step": lookups.value_step,
        "value_offset": lookups.value_offset,
        "offset_cos": phases.offset_cos.view(torch.int32),
        "offset_sin": phases.offset_sin.view(torch.int32),
        "scales": rows.value_pages.scales.view(torch.int32),
    }


def scratch_bytes(
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_pages: int,
    exact_room: int,
    bits: tuple[int, int],
    outliers: bool,
    device: torch.device,
) -> int:
    """Bytes that ``decode`` holds beside its arguments, its output included.

    Args:
        batch, num_heads, num_kv_heads, head_dim: B, HQ, H, D.
        max_pages: width of the block table.
        exact_room: exact tokens that a row has room for, E.
        bits: of keys and of values.
        outliers: whether keys or values have any.
        device: decides how many programs share a row.

    Counted: queries of each page, f16, once or twice, and a number a head; of each split an output
    and two numbers a query head, f32; with outliers a weight in f16 for each token and query head,
    and in f32 a number for each page and query head, and one for each page and head.
    """
    heads, rows = batch * num_heads, batch * num_kv_heads
    group_size = num_heads // num_kv_heads
    pages = max_pages if outliers else 0
    fixed = 4 * heads * head_dim + heads * pages * (2 * PAGE_TOKENS + 4) + 4 * rows * pages
    padded = rows * triton.next_power_of_2(group_size)
    each = []
    # What a model rotates is not known here, and decides between the two.
    for rotary_dim in (0, head_dim):
        main = decode_launch(
            architecture(device), bits=bits, head_dim=head_dim, rotary_dim=rotary_dim,
            group_size=group_size,
        )  # fmt: skip
        splits = page_splits(
            main, batch=batch, num_kv_heads=num_kv_heads, max_pages=max_pages, device=device
        )
        splits += triton.cdiv(exact_room, EXACT_TILE.value)
        copies = 2 if main.path == "registers" and outliers else 1
        queries = padded * (2 * copies * max_pages * head_dim + 4)
        each.append(4 * heads * splits * (head_dim + 2) + queries)
    return fixed + max(each)
