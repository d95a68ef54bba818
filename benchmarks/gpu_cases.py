"""Packed caches of random numbers, made on the device by kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from gpu_shapes import Codes, Shape
from torch import Tensor

from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.feedback import Feedback
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, LayerParameters, ValueParameters
from kvq_kernels.attention import DecodedPages
from kvq_kernels.decode import decode
from kvq_kernels.dequantize import KeyDequantizer, ValueDequantizer
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.pack import KeyPacker, ValuePacker
from kvq_kernels.packed_rows import PackedRows
from kvq_kernels.phases import Phases
from kvq_kernels.rotary import RotaryAngles, rotate

SINKS = 1
TABLE_MULTIPLE = 16
"""Width of block tables: kernels are compiled once for all that 16 divides."""

OUTLIER_DEVIATIONS = 2.5758
"""Half-range of a normal channel in standard deviations, where 1 % lies outside."""

ROPE_THETA = 500_000.0

GRADIENTS = 16
"""Random gradients that feedback is fitted to, for each channel."""


@dataclass(frozen=True)
class PackedLayerTables:
    """What one layer's packed cache is made and read with, on the device."""

    parameters: LayerParameters
    config: KVQConfig
    tables: KernelTables
    angles: RotaryAngles
    phases: Phases
    keys: KeyPacker
    values: ValuePacker

    @classmethod
    def of(
        cls, shape: Shape, codes: Codes, *, device: torch.device, feedback: bool = False
    ) -> PackedLayerTables:
        """For normal numbers, of which the config's share are outliers.

        ``feedback`` makes packing dearer and leaves what is read as large as it is: caches that are
        only read do without.
        """
        H, D = shape.num_kv_heads, shape.head_dim
        config = codes.config.model_copy(update={"feedback": feedback})
        # Quantiles of the normal distribution: entries where numbers are.
        shares = (torch.arange(1 << codes.bits) + 0.5) / (1 << codes.bits)
        entries = torch.special.ndtri(shares.double())
        codebook = Codebook.fit_grid((entries / entries[-1]).float())
        parameters = LayerParameters(
            key=KeyParameters(
                center=torch.zeros(H, D),
                half_range=torch.full((H, D), OUTLIER_DEVIATIONS),
                codebook=codebook,
                outlier_step=1 / 64,
                feedback=random_feedback(H, D) if feedback else None,
            ),
            value=ValueParameters(
                codebook, outlier_step=1 / 64, feedback=random_feedback(H, D) if feedback else None
            ),
        )
        half = D // 2
        frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = RotaryAngles(frequencies.to(device))
        return cls.with_parameters(parameters, config, angles, device=device)

    @classmethod
    def with_parameters(
        cls,
        parameters: LayerParameters,
        config: KVQConfig,
        angles: RotaryAngles,
        *,
        device: torch.device,
    ) -> PackedLayerTables:
        """For parameters that are given."""
        return cls(
            parameters=parameters,
            config=config,
            tables=KernelTables.of(parameters, config, device=device),
            angles=angles,
            phases=Phases.of(angles, device=device),
            keys=KeyPacker(parameters.key, config, device=device),
            values=ValuePacker(parameters.value, config, device=device),
        )


def random_feedback(H: int, D: int) -> Feedback:
    """Of gradients that prefer no direction: gains are small, and outliers stay about as many."""
    gradients = torch.randn(H, GRADIENTS * D, D, dtype=torch.float64)
    return Feedback.fit(gradients.mT @ gradients, damping=0.0)


def shares_of(tokens: int) -> tuple[int, int, int]:
    """Pages, sinks and tail of a row that holds ``tokens`` (at least 1), as a cache keeps them."""
    pages = max(0, -(-(tokens - SINKS - PAGE_TOKENS) // PAGE_TOKENS))
    return pages, SINKS, tokens - SINKS - pages * PAGE_TOKENS


def packed_rows(layer: PackedLayerTables, keys: Tensor, values: Tensor) -> PackedRows:
    """Rows of ``[B, H, T, D]`` keys (before RoPE) and values, packed by kernels on the device."""
    B, H, T, D = keys.shape
    device = keys.device
    pages, sinks, tail = shares_of(T)
    span = slice(sinks, sinks + pages * PAGE_TOKENS)

    def paged(x: Tensor) -> Tensor:
        return x[:, :, span].transpose(0, 1).reshape(H, B * pages * PAGE_TOKENS, D)

    key_pages, value_pages = layer.keys.pack(paged(keys)), layer.values.pack(paged(values))
    index = torch.arange(B * pages, dtype=torch.int32, device=device)
    if pages:
        key_pages.base_positions.copy_(sinks + index % pages * PAGE_TOKENS)
    width = -(-max(1, pages) // TABLE_MULTIPLE) * TABLE_MULTIPLE
    table = torch.zeros(B, width, dtype=torch.int32, device=device)
    table[:, :pages] = index.view(B, pages)
    room = SINKS + PAGE_TOKENS
    exact = torch.full((2, B, H, room, D), torch.nan, dtype=keys.dtype, device=device)
    positions = torch.zeros(B, room, dtype=torch.int32, device=device)
    for part, first, count in ((slice(0, sinks), 0, sinks), (None, span.stop, tail)):
        part = part or slice(sinks, sinks + tail)
        exact[0, :, :, part] = keys[:, :, first : first + count]
        exact[1, :, :, part] = values[:, :, first : first + count]
        positions[:, part] = torch.arange(first, first + count, device=device)
    return PackedRows(
        key_pages=key_pages,
        value_pages=value_pages,
        block_table=table,
        lengths=torch.tensor([[pages, sinks, tail]] * B, dtype=torch.int32, device=device),
        exact_keys=exact[0],
        exact_values=exact[1],
        exact_positions=positions,
    )


def copied(rows: PackedRows) -> PackedRows:
    """The same rows in other memory."""

    def again(pages: Any) -> Any:
        return type(pages)(*(getattr(pages, part.name).clone() for part in fields(pages)))

    tensors = (rows.block_table, rows.lengths, rows.exact_keys, rows.exact_values)
    return PackedRows(
        again(rows.key_pages),
        again(rows.value_pages),
        *(tensor.clone() for tensor in (*tensors, rows.exact_positions)),
    )


def cache_bytes(rows: PackedRows) -> int:
    """Bytes of pages, and of the sinks and tail that are held."""
    parts = [
        getattr(pages, part.name).nbytes
        for pages in (rows.key_pages, rows.value_pages)
        for part in fields(pages)
    ]
    held = int(rows.lengths[:, 1:].sum())
    _, H, _, D = rows.exact_keys.shape
    return sum(parts) + 2 * held * H * D * rows.exact_keys.element_size()


def random_numbers(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Normal numbers, made where they are used."""
    return torch.randn(*shape, device=device, dtype=dtype)


def decoding(
    layer: PackedLayerTables, query: Tensor, rows: PackedRows, **how: Any
) -> Callable[[], Tensor]:
    """A call that decodes one step."""
    return lambda: decode(query, rows, layer.tables, layer.phases, **how)


@dataclass(frozen=True)
class ReferencePages:
    """Pages of a pool, in their order, decoded by plain torch; an ``attention.RowPages``."""

    key_pages: KeyPages
    value_pages: ValuePages
    parameters: LayerParameters
    config: KVQConfig
    angles: RotaryAngles
    lengths: Sequence[int]
    ends: Sequence[int]

    def read(self, first: int, last: int) -> DecodedPages:
        """Decode pages ``first`` to ``last - 1``."""
        key, value = (
            type(pages)(*(getattr(pages, part.name)[first:last] for part in fields(pages)))
            for pages in (self.key_pages, self.value_pages)
        )
        cos, sin = self.angles.page_cos_sin(key.base_positions)
        keys, values = self._dequantizers
        turned = rotate(keys.dequantize(key), cos[:, None], sin[:, None])
        return DecodedPages(turned, *values.dequantize(value))

    @cached_property
    def _dequantizers(self) -> tuple[KeyDequantizer, ValueDequantizer]:
        device, parameters, config = self.key_pages.words.device, self.parameters, self.config
        return (
            KeyDequantizer(parameters.key, bits=config.key_bits, device=device),
            ValueDequantizer(parameters.value, bits=config.value_bits, device=device),
        )
