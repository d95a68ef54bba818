"""One layer on Triton kernels: encodes pages and attends over them on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvq_formats.pages import KeyPages, ValuePages
from kvq_kernels import decode, prefill
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.pack import KeyPacker, ValuePacker
from kvq_kernels.packed_rows import PAGE_ID_MASK, PackedRows
from kvq_kernels.phases import phases_of
from kvq_kernels.rotate_queries import rotate_queries
from kvq_kernels.workspace import Workspace
from kvq_runtime.decode_step import StepForward

if TYPE_CHECKING:
    import torch

    from kvq_formats.config import KVQConfig
    from kvq_formats.parameters import LayerParameters
    from kvq_kernels.rotary import RotaryAngles
    from kvq_runtime.layer import PackedLayer
    from kvq_runtime.page_pool import PagePool


class LayerKernels:
    """What a ``SidecarPageCodec`` and its layer do with ``impl="triton"``."""

    def __init__(
        self,
        parameters: LayerParameters,
        config: KVQConfig,
        *,
        device: torch.device,
        workspace: Workspace,
    ) -> None:
        self.device = device
        self.workspace = workspace
        self.tables = KernelTables.of(parameters, config, device=device)
        self.keys = KeyPacker(parameters.key, config, device=device)
        self.values = ValuePacker(parameters.value, config, device=device)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[KeyPages, ValuePages]:
        """Pages of ``[H, P * 256, D]``; base positions are not set."""
        return self.keys.pack(keys), self.values.pack(values)

    def rotate(self, query: Tensor, positions: Tensor, angles: RotaryAngles) -> Tensor:
        """Queries ``[B, HQ, D]`` of one token a row at ``positions``, i32 ``[B]``."""
        return rotate_queries(query, positions, phases_of(angles, device=self.device))

    def decode(
        self, query: Tensor, layer: PackedLayer, angles: RotaryAngles, options: AttentionOptions
    ) -> Tensor:
        """Attention of one query a row, ``[B, HQ, D]``, over all that the layer holds: f32."""
        forward = layer.forward
        return decode.decode(
            query,
            packed_rows(layer),
            self.tables,
            phases_of(angles, device=self.device),
            options=options,
            workspace=forward.workspace if isinstance(forward, StepForward) else self.workspace,
        )

    def prefill(
        self, query: Tensor, layer: PackedLayer, place: int, angles: RotaryAngles, **seen: Any
    ) -> Tensor:
        """Attention of a row's queries ``[HQ, T, D]``: f32 ``[T, HQ, D]``.

        ``seen`` is what ``kvq_kernels.attention.attend`` takes beside query and pages.
        """
        row = layer.rows[place]
        key_pages, value_pages = layer.pool.whole()
        pages = prefill.KernelPages(
            key_pages=key_pages,
            value_pages=value_pages,
            ids=layer.block_table[place, : len(row.pages)] & PAGE_ID_MASK,
            lengths=row.lengths,
            ends=row.ends,
            tables=self.tables,
            phases=phases_of(angles, device=self.device),
            irregular_positions=_irregular(layer.pool),
            workspace=self.workspace,
        )
        return prefill.attend(query, pages=pages, **seen)


def packed_rows(layer: PackedLayer) -> PackedRows:
    """All rows of a layer as decode kernels read them."""
    key_pages, value_pages = layer.pool.whole()
    assert layer.forward is not None
    return PackedRows(
        key_pages=key_pages,
        value_pages=value_pages,
        block_table=layer.block_table,
        lengths=layer.forward.lengths(layer.rows, layer.device),
        exact_keys=layer.exact.keys,
        exact_values=layer.exact.values,
        exact_positions=layer.exact.positions,
        irregular_positions=_irregular(layer.pool),
    )


def _irregular(pool: PagePool) -> Tensor | None:
    return pool.irregular_positions if pool.irregular else None
