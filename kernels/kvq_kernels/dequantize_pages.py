"""Dequantize pages in kernels: packed codes to token-major numbers, keys rotated if asked for.

Blocks of pages become plain keys and values in f16 for prefill attention, or f32 for tests and
debugging: then they are the specification's numbers but for a few roundings of f32. Arithmetic is
f32 for both, and a number is rounded once; in f16 an outlier adds a rounding to the channels that
it reaches. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvq_formats import outliers
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.pages import KeyPages, ValuePages
from kvq_kernels.dequantize_kernels import (
    add_key_outliers,
    add_value_outliers,
    dequantize_key_pages,
    dequantize_value_pages,
)
from kvq_kernels.kernel_tables import SMALLEST_TILE, KernelTables, channel_tile, channel_tiles
from kvq_kernels.launch import current
from kvq_kernels.pair_lookup import GROUPS
from kvq_kernels.phases import Phases

OUTLIER_WARPS = 4


def dequantize_keys(
    key_pages: KeyPages,
    ids: Tensor | None,
    tables: KernelTables,
    phases: Phases | None = None,
    *,
    irregular_positions: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Keys of pages, one after the other, outliers added.

    Args:
        key_pages: P pages in one piece, on the device.
        ids: i32 or i64 ``[n]``, on the device, in any order; None for all pages in order.
        tables: of the layer, on the device.
        phases: turn keys to their positions; None leaves them before RoPE.
        irregular_positions: i32 ``[I, 256]`` (``PackedRows``); None if no page has any.
        out: contiguous f16 or f32 ``[H, n * 256, D]`` to write to; None allocates.
        dtype: f16 or f32, of what is allocated.

    Returns: ``[H, n * 256, D]``, channels in rotary channel order. f16 saturates.

    Raises KVQError where the rotation cannot be cut into tiles (``channel_tiles``).
    """
    H, D = tables.num_kv_heads, tables.head_dim
    device = key_pages.words.device
    ids = _ids(ids, key_pages.words)
    output = _output(out, (H, len(ids) * PAGE_TOKENS, D), dtype, device)
    tiles = _unrotated_tiles(D) if phases is None else channel_tiles(D, phases)
    if len(ids) == 0:
        return output
    wide = output.dtype == torch.float32
    key = tables.parameters.key
    no_use = key_pages.base_positions
    shared: dict[str, Any] = {
        "output": output,
        "half_range": tables.outlier_half_range,
        "ids": ids,
        "base_positions": key_pages.base_positions,
        # Where a kernel has no use for a tensor it gets one that it does not touch.
        "irregular_positions": no_use if irregular_positions is None else irregular_positions,
        "phase_high": no_use if phases is None else phases.high,
        "phase_low": no_use if phases is None else phases.low,
        "tokens": output.shape[1],
        "rotary_scaling": 1.0 if phases is None else phases.scaling,
        "H": H,
        "D": D,
        "HALF": tiles["HALF"],
        "IRREGULAR": phases is not None and irregular_positions is not None,
    }
    with current(device):
        dequantize_key_pages[(len(ids) * GROUPS.value, H)](
            words=key_pages.words.view(torch.int32),
            center=key.center.float().contiguous().to(device) if wide else tables.center,
            table=_entries(key.codebook, device) if wide else tables.key_pairs,
            **shared,
            HALF_TILE=tiles["HALF_TILE"],
            REST_TILE=tiles["REST_TILE"],
            BITS=tables.config.key_bits,
            WIDE=wide,
            num_warps=_dense_warps(D),
        )
        capacity = key_pages.outliers.shape[-1]
        for second in (False, True) if tiles["HALF"] else (False,):
            if capacity:
                add_key_outliers[(len(ids), H)](
                    pools=key_pages.outliers,
                    counts=key_pages.outlier_counts,
                    **shared,
                    residual_step=key.outlier_step,
                    CAPACITY=capacity,
                    CHANNEL_BITS=outliers.channel_bits(D),
                    SECOND=second,
                    num_warps=OUTLIER_WARPS,
                )
    return output


def dequantize_values(
    value_pages: ValuePages,
    ids: Tensor | None,
    tables: KernelTables,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of pages in their own units, outliers added; as ``dequantize_keys``."""
    H, D = tables.num_kv_heads, tables.head_dim
    device = value_pages.words.device
    ids = _ids(ids, value_pages.words)
    output = _output(out, (H, len(ids) * PAGE_TOKENS, D), dtype, device)
    if len(ids) == 0:
        return output
    wide = output.dtype == torch.float32
    value = tables.parameters.value
    shared: dict[str, Any] = {
        "output": output,
        "scales": value_pages.scales,
        "ids": ids,
        "tokens": output.shape[1],
        "H": H,
        "D": D,
        "D_TILE": channel_tile(D),
        "SCALE_HEADS": value_pages.scales.shape[1],
    }
    with current(device):
        dequantize_value_pages[(len(ids) * GROUPS.value, H)](
            words=value_pages.words.view(torch.int32),
            table=_entries(value.codebook, device) if wide else tables.value_pairs,
            **shared,
            BITS=tables.config.value_bits,
            WIDE=wide,
            num_warps=_dense_warps(D),
        )
        if capacity := value_pages.outliers.shape[-1]:
            add_value_outliers[(len(ids), H)](
                lists=value_pages.outliers,
                offsets=value_pages.outlier_offsets,
                **shared,
                residual_step=value.outlier_step,
                CAPACITY=capacity,
                num_warps=OUTLIER_WARPS,
            )
    return output


def _ids(ids: Tensor | None, words: Tensor) -> Tensor:
    return torch.arange(len(words), device=words.device) if ids is None else ids.contiguous()


def _output(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    output = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    assert output.shape == shape
    assert output.is_contiguous()
    assert output.dtype in (torch.float16, torch.float32)
    return output


def _dense_warps(head_dim: int) -> int:
    # With 4 a thread would run out of registers for the cosines and sines of 256 channels.
    return 4 if head_dim <= 128 else 8


def _unrotated_tiles(head_dim: int) -> dict[str, int]:
    return {"HALF": 0, "HALF_TILE": SMALLEST_TILE, "REST_TILE": channel_tile(head_dim)}


def _entries(codebook: Codebook, device: torch.device) -> Tensor:
    return codebook.decode_entries.contiguous().to(device)
