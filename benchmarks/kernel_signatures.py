"""Types of the kernels' arguments in a bf16 model, to compile them without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kernel_code import KernelCode, Target, compile_kernel, read_code

TYPES = {
    "query": "*bf16", "turned": "*fp16", "page_queries": "*fp16", "sizes": "*fp32",
    "max_pages": "i32",
    "key_words": "*i32", "key_half_range": "*fp16", "key_center": "*fp16",
    "key_table": "*i32", "value_words": "*i32", "value_table": "*i32",
    "block_table": "*i32", "lengths": "*i32", "base_positions": "*i32",
    "irregular_positions": "*i32", "phase_high": "*i32", "phase_low": "*i32",
    "offset_cos": "*fp16", "offset_sin": "*fp16", "exact_keys": "*bf16", "exact_values": "*bf16",
    "exact_positions": "*i32", "weights": "*fp16", "page_max": "*fp32",
    "page_range": "*fp32", "split_out": "*fp32",
    "split_max": "*fp32", "split_sum": "*fp32", "table_width": "i32", "weight_tokens": "i32",
    "exact_room": "i32", "score_scale": "fp32", "softcap": "fp32", "rotary_scaling": "fp32",
    "pools": "*i16", "counts": "*u8", "half_range": "*fp32", "residual_step": "fp32",
    "lists": "*i16", "offsets": "*u16", "scales": "*fp16", "sink_logits": "*fp32",
    "output": "*fp32", "splits": "i32", "words": "*i32", "center": "*fp16", "table": "*i32",
    "ids": "*i64", "tokens": "i32", "keys": "*fp16", "values": "*fp16", "seen_from": "*i32",
    "seen_until": "*i32", "largest": "*fp32", "total": "*fp32", "query_head_stride": "i32",
    "query_token_stride": "i32", "key_head_stride": "i32", "key_token_stride": "i32",
    "value_head_stride": "i32", "value_token_stride": "i32", "queries": "i32", "index": "i32",
    "fresh": "i32", "midpoints": "*fp32", "decode_entries": "*fp32", "magnitudes": "*fp32",
    "entries": "*i16", "stride_head": "i32", "stride_token": "i32", "outlier_step": "fp32",
    "bounds": "*fp32", "places": "*i32", "order": "*i16", "gains": "*fp16", "errors": "*fp32",
    "shaped": "*fp32", "shift": "*fp32",
    "key_lookup": "*i32", "value_lookup": "*i32", "key_scale": "*i32", "key_zero": "*i32",
    "offset_turns": "*fp16", "key_sums": "*fp32", "key_marks": "*i32", "key_queries": "*fp16",
    "value_sums": "*fp32", "value_step": "fp32", "value_offset": "fp32",
}  # fmt: skip
"""Arguments of kernels in a bf16 model."""

PAIRS = dict.fromkeys(["offset_cos", "offset_sin", "scales"], "*i32")
"""What the fast path reads two f16 at a time."""

ALIGNED = {"weight_tokens", "tokens", "stride_head", "stride_token"}
"""Numbers that are multiples of 16, beside strides and addresses."""


def code_of(
    kernel: Any,
    constexprs: Mapping[str, Any],
    *,
    target: Target,
    warps: int,
    stages: int = 3,
    types: Mapping[str, str] = MappingProxyType({}),
    options: Mapping[str, Any] | None = None,
) -> KernelCode:
    """Compile a kernel whose other arguments have the types of ``TYPES``, but for ``types``."""
    signature = {
        name: {**TYPES, **types}[name] for name in kernel.arg_names if name not in constexprs
    }
    aligned = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or name in ALIGNED or name.endswith("_stride")
    ]
    return read_code(
        compile_kernel(
            kernel,
            signature,
            constexprs,
            divisible=aligned,
            target=target,
            num_warps=warps,
            num_stages=stages,
            options=options,
        )
    )
