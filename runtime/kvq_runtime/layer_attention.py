"""What the queries of a forward read of a packed layer, by kernels or by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvq_kernels.attention import AttentionOptions, ExactTokens, attend
from kvq_kernels.rotary import rotate
from kvq_runtime.exact_tokens import Tokens
from kvq_runtime.forward import Rule
from kvq_runtime.row_pages import PooledPages

if TYPE_CHECKING:
    from kvq_runtime.layer import PackedLayer


@dataclass(frozen=True)
class Reading:
    """What the queries of one row read in this forward.

    Fields:
        attended: which of the T queries are attended, i64; None for all.
        index: of the first one in its row.
        held_pages: pages that were complete before.
        exact: sinks and all tokens after the held pages.
        sinks: how many of them are sinks.
        start: index of the first token after the held pages.
    """

    attended: Tensor | None
    index: int
    held_pages: int
    exact: Tokens
    sinks: int
    start: int


def attend_rows(
    layer: PackedLayer,
    readings: Sequence[Reading],
    query: Tensor,
    options: AttentionOptions,
    *,
    rule: Rule,
) -> Tensor:
    """Attention of the queries ``[B, HQ, T, D]`` of one forward: ``[B, T, HQ, D]``, f32 or f64."""
    B, HQ, T, D = query.shape
    angles = layer.codec.rotary.angles()
    if layer.impl == "triton" and T == 1:
        output = layer.codec.kernels.decode(query[:, :, 0], layer, angles, options)[:, None]
        for place, reading in enumerate(readings):
            if reading.attended is not None and len(reading.attended) == 0:
                output[place] = 0.0
        return output
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(B, T, HQ, D, dtype=dtype)
    for place, reading in enumerate(readings):
        attended = slice(None) if reading.attended is None else reading.attended
        asked = query[place][:, attended]
        if asked.shape[1] == 0:
            continue
        keys, values, positions = reading.exact
        seen: dict[str, Any] = {
            "index": reading.index,
            "held_pages": reading.held_pages,
            "exact": ExactTokens(
                keys=rotate(keys, *angles.cos_sin(positions)),
                values=values,
                sinks=reading.sinks,
                start=reading.start,
            ),
            "recent_tokens": layer.codec.recent_tokens,
            "options": options,
            "exact_prefill": rule == "exact-prefill" and T > 1,
        }
        if layer.impl == "triton":
            found = layer.codec.kernels.prefill(asked, layer, place, angles, **seen)
        else:
            pages = PooledPages(layer.pool, layer.rows[place], angles)
            found = attend(asked, pages=pages, **seen)
        output[place, attended] = found
    return output
