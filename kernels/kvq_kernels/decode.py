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
from kvq_formats.errors import KVQError
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.decode_buffers import DecodeShape, decode_buffers
from kvq_kernels.decode_exact import exact_splits
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
from kvq_kernels.launch_table import PATH_VARIABLE, decode_launch
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
    shape = DecodeShape(
        batch=B,
        num_kv_heads=H,
        group_size=G,
        head_dim=D,
        max_pages=max_pages,
        exact_room=rows.exact_keys.shape[2],
        splits=splits,
        key_pool=rows.key_pages.outliers.shape[-1],
        value_list=rows.value_pages.outliers.shape[-1],
    )
    workspace = workspace or Workspace()
    buffers = {
        name: workspace.take(name, size, dtype, device)
        for name, (size, dtype) in decode_buffers(shape, main).items()
    }
    fast = main.path == "registers"
    key_outliers, value_outliers = shape.key_pool > 0, shape.value_list > 0
    lanes = warp_lanes(device)
    query = query.contiguous()
    output = torch.empty(B, HQ, D, dtype=torch.float32, device=device)

    lookups = tables.lookups
    # Each kernel takes what it names.
    arguments: dict[str, Any] = {
        "query": query,
        **buffers,
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
        "offset_turns": phases.offset_turns,
        "key_lookup": lookups.key_lookup,
        "value_lookup": lookups.value_lookup,
        "key_scale": lookups.key_scale.view(torch.int32),
        "key_zero": lookups.key_zero.view(torch.int32),
        "value_step": lookups.value_step,
        "value_offset": lookups.value_offset,
        "exact_keys": rows.exact_keys,
        "exact_values": rows.exact_values,
        "exact_positions": rows.exact_positions,
        "table_width": rows.block_table.shape[1],
        "max_pages": max_pages,
        "weight_tokens": shape.weight_tokens,
        "exact_room": shape.exact_room,
        "splits": shape.all_splits,
        **score_arguments(options),
        "rotary_scaling": phases.scaling,
        **channel_tiles(D, phases),
        "HQ": HQ,
        "H": H,
        "G": G,
        "GROUP_WIDTH": shape.width,
        "N": group_tile(G, device=device),
        "K_BITS": tables.config.key_bits,
        "V_BITS": tables.config.value_bits,
        "CHANNEL_BITS": outliers.channel_bits(D),
        "SCALE_HEADS": rows.value_pages.scales.shape[1],
        "EXACT_SPLITS": shape.exact_tiles,
        "PART": lanes,
        "SINK_LOGITS": sinks is not None,
        "KEY_OUTLIERS": key_outliers,
        "VALUE_OUTLIERS": value_outliers,
        "IRREGULAR": irregular is not None,
        "BY_CHANNEL": key_outliers or not fast,
        "BY_HEAD": fast,
        "PRECISION": exact_precision(query.dtype),
    }

    def launch(kernel: Any, *grid: int, **how: Any) -> None:
        given = {name: arguments[name] for name in kernel.arg_names if name not in how}
        kernel[grid](**given, **how)

    key_step = {"residual_step": tables.parameters.key.outlier_step, "CAPACITY": shape.key_pool}
    value_step = {
        "residual_step": tables.parameters.value.outlier_step,
        "CAPACITY": shape.value_list,
    }
    kernels = fast_kernels() if fast else (key_outlier_scores, decode_splits, value_outlier_sums)
    score_outliers, read_pages, sum_outliers = kernels
    with current(device):
        if max_pages:
            launch(turn_queries, triton.cdiv(max_pages, TURN_PAGES.value), H, B, num_warps=1)
        if key_outliers and max_pages:
            programs = buffers["key_sums"].shape[2] if fast else max_pages
            launch(score_outliers, programs, H, B, num_warps=1, **key_step)
        how = _two_a_word(phases, rows) if fast else {}
        launch(read_pages, splits, H, B, num_warps=main.warps, num_stages=1, **how)
        if shape.exact_tiles:
            launch(exact_splits, shape.exact_tiles, H, B, num_warps=4)
        if value_outliers and max_pages:
            parts = 1 if fast else triton.cdiv(D, lanes)
            warps = buffers["value_sums"].shape[3] if fast else 1
            launch(sum_outliers, splits * parts, H, B, num_warps=warps, **value_step)
        launch(merge_splits, HQ, B, num_warps=4)
    return output


def fast_kernels() -> tuple[Any, Any, Any]:
    """The fast path's outliers of keys, pages, and outliers of values.

    Gluon changes between versions of Triton: whoever does not run it does not load it. Raises
    KVQError where it does not load.
    """
    try:
        from kvq_kernels.nvidia.decode_pages import decode_pages
        from kvq_kernels.nvidia.key_outliers import key_outlier_scores
        from kvq_kernels.nvidia.value_outliers import value_outlier_sums
    except (ImportError, AttributeError) as error:
        raise KVQError(
            f"the fast decode kernels do not load with Triton {triton.__version__}: {error}",
            hint=f"{PATH_VARIABLE}=portable in the environment, or Triton 3.6 or 3.7",
        ) from error
    return key_outlier_scores, decode_pages, value_outlier_sums


def _two_a_word(phases: Phases, rows: PackedRows) -> dict[str, Tensor]:
    """Tensors of f16 that the fast path reads as i32."""
    return {
        "offset_cos": phases.offset_cos.view(torch.int32),
        "offset_sin": phases.offset_sin.view(torch.int32),
        "scales": rows.value_pages.scales.view(torch.int32),
    }
