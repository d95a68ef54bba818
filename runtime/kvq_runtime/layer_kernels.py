"""One layer on Triton kernels: encodes pages and attends over them on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_formats.pages import KeyPages, ValuePages
from kvq_kernels import decode
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.pack import KeyPacker, ValuePacker
from kvq_kernels.packed_rows import PackedRows
from kvq_kernels.phases import phases_of
from kvq_kernels.workspace import Workspace

if TYPE_CHECKING:
    from kvq_formats.config import KVQConfig
    from kvq_formats.parameters import LayerParameters
    from kvq_kernels.rotary import RotaryAngles


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
        """Raises KVQError where kernels cannot hold the layer's keys."""
        self.device = device
        self.workspace = workspace
        self.tables = KernelTables.of(parameters, config, device=device)
        self.keys = KeyPacker(parameters.key, config, device=device)
        self.values = ValuePacker(parameters.value, config, device=device)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[KeyPages, ValuePages]:
        """Pages of ``[H, P * 256, D]``; base positions are not set."""
        return self.keys.pack(keys), self.values.pack(values)

    def decode(
        self, query: Tensor, rows: PackedRows, angles: RotaryAngles, options: AttentionOptions
    ) -> Tensor:
        """Attention of one query a row, ``[B, HQ, D]``, over all that the rows hold: f32."""
        return decode.decode(
            query,
            rows,
            self.tables,
            phases_of(angles, device=self.device),
            options=options,
            workspace=self.workspace,
        )
