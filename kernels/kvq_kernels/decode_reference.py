"""Decode attention in plain torch: the reference of ``kvq_kernels.decode``, over the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.attention import AttentionOptions, DecodedPages, ExactTokens, attend
from kvq_kernels.dequantize import KeyDequantizer, ValueDequantizer
from kvq_kernels.packed_rows import CUT_SHIFT, PAGE_ID_MASK, PackedRows
from kvq_kernels.rotary import RotaryAngles, rotate

if TYPE_CHECKING:
    from kvq_kernels.kernel_tables import KernelTables


def decode(
    query: Tensor,
    rows: PackedRows,
    tables: KernelTables,
    angles: RotaryAngles,
    *,
    options: AttentionOptions,
    max_pages: int | None = None,
) -> Tensor:
    """As ``kvq_kernels.decode.decode``; ``angles`` in place of phases, in f32 or f64 throughout."""
    output = query.new_zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
    for place, (pages, sinks, tail) in enumerate(rows.lengths.tolist()):
        held = sinks + tail
        if held + pages == 0:
            continue
        row = _TablePages(rows, tables, angles, rows.block_table[place, :pages], sinks)
        start = row.ends[-1] + 1 if pages else sinks
        cos, sin = angles.cos_sin(rows.exact_positions[place, :held])
        attended = attend(
            query[place][:, None],
            index=start + tail - 1,
            pages=row,
            held_pages=pages,
            exact=ExactTokens(
                keys=rotate(rows.exact_keys[place, :, :held], cos, sin),
                values=rows.exact_values[place, :, :held],
                sinks=sinks,
                start=start,
            ),
            recent_tokens=0,
            options=options,
        )
        output[place] = attended[0]
    return output


@dataclass(frozen=True)
class _TablePages:
    """Pages of a row by its block table; an ``attention.RowPages``."""

    rows: PackedRows
    tables: KernelTables
    angles: RotaryAngles
    entries: Tensor
    sinks: int

    @cached_property
    def lengths(self) -> Sequence[int]:
        lengths: list[int] = (PAGE_TOKENS - (self.entries >> CUT_SHIFT)).tolist()
        return lengths

    @cached_property
    def ends(self) -> Sequence[int]:
        ends, end = [], self.sinks - 1
        for length in self.lengths:
            end += length
            ends.append(end)
        return ends

    def read(self, first: int, last: int) -> DecodedPages:
        ids = (self.entries[first:last] & PAGE_ID_MASK).long()
        rows, tables = self.rows, self.tables
        key, value = _picked(rows.key_pages, ids), _picked(rows.value_pages, ids)
        parameters, config = tables.parameters, tables.config
        device = ids.device
        keys = KeyDequantizer(parameters.key, bits=config.key_bits, device=device).dequantize(key)
        cos, sin = self.angles.page_cos_sin(key.base_positions)
        for place, base in enumerate(key.base_positions.tolist()):
            if base < 0:
                assert rows.irregular_positions is not None
                cos[place], sin[place] = self.angles.cos_sin(rows.irregular_positions[-1 - base])
        values = ValueDequantizer(parameters.value, bits=config.value_bits, device=device)
        return DecodedPages(rotate(keys, cos[:, None], sin[:, None]), *values.dequantize(value))


def _picked(pages: Any, ids: Tensor) -> Any:
    def pick(field: Tensor) -> Tensor:
        if field.dtype == torch.uint16:
            return field.view(torch.int16)[ids].view(torch.uint16)
        return field[ids]

    return type(pages)(*(pick(getattr(pages, field.name)) for field in fields(pages)))
