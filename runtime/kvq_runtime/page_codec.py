"""One layer's pages: what encodes them, what reads them, in the order that its rotation wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_formats import pages
from kvq_formats.config import KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, LayerParameters
from kvq_formats.sidecar import Sidecar
from kvq_formats.sidecar_tensors import layer_tensors, tensors_sha256
from kvq_kernels.dequantize import KeyDequantizer, ValueDequantizer
from kvq_kernels.workspace import Workspace
from kvq_runtime.implementation import ImplementationName
from kvq_runtime.rotary_layout import LayerRotary, learn_rotary

if TYPE_CHECKING:
    from kvq_runtime.layer_kernels import LayerKernels


class PageCodec(Protocol):
    """Encodes complete pages of one layer and reads them back.

    Pages are dataclasses of tensors whose first axis counts pages; keys are before RoPE, in rotary
    channel order (``rotary.order``), and have a field ``base_positions`` i32 ``[P]``.

    Fields:
        sink_tokens, recent_tokens: tokens that stay exact.
        num_kv_heads, head_dim: H and D of what it encodes.
        rotary: how the layer rotates its keys.
    """

    @property
    def sink_tokens(self) -> int: ...

    @property
    def recent_tokens(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def rotary(self) -> LayerRotary: ...

    @property
    def kernels(self) -> LayerKernels:
        """The layer on Triton kernels, for implementations that have any."""
        ...

    def allocate(self, num_pages: int, *, device: torch.device | str) -> tuple[Any, Any]:
        """Empty key and value pages; on the ``meta`` device they cost nothing."""
        ...

    def encode(
        self, keys: Tensor, values: Tensor, *, impl: ImplementationName = "reference"
    ) -> tuple[Any, Any]:
        """Pages of ``[H, P * 256, D]`` keys and values, any float dtype; positions are not set."""
        ...

    def decode_keys(self, key_pages: Any) -> Tensor:
        """f32 ``[P, H, 256, D]``, before RoPE; there until the next pages are decoded."""
        ...

    def decode_values(self, value_pages: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values, half-range and centre as ``kvq_kernels.attention.DecodedPages`` wants them."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same codec with its tables on ``device``."""
        ...


class SidecarPageCodec:
    """The pages that a sidecar describes."""

    def __init__(
        self,
        parameters: LayerParameters,
        config: KVQConfig,
        rotary: LayerRotary | None,
        *,
        device: torch.device | str = "cpu",
        workspace: Workspace | None = None,
    ) -> None:
        """``parameters`` name key channels in rotary channel order; ``config`` is the layer's.

        Without ``rotary`` the codec tells shapes and bytes only.
        """
        self.config = config
        self.parameters = parameters
        self._rotary = rotary
        self.sink_tokens = config.sink_tokens
        self.recent_tokens = config.recent_tokens
        self.num_kv_heads, self.head_dim = parameters.key.center.shape
        self.device = torch.device(device)
        self.workspace = workspace
        self.keys = KeyDequantizer(
            parameters.key, bits=config.key_bits, device=device, workspace=workspace
        )
        self.values = ValueDequantizer(
            parameters.value, bits=config.value_bits, device=device, workspace=workspace
        )

    @property
    def rotary(self) -> LayerRotary:
        """How the layer rotates its keys."""
        assert self._rotary is not None
        return self._rotary

    @cached_property
    def digest(self) -> str:
        """Hash of the parameters."""
        return tensors_sha256(layer_tensors({0: self.parameters}))

    def allocate(
        self, num_pages: int, *, device: torch.device | str
    ) -> tuple[KeyPages, ValuePages]:
        """Empty pages of both kinds."""
        H, D = self.num_kv_heads, self.head_dim
        sizes: dict[str, Any] = {"num_pages": num_pages, "num_kv_heads": H, "head_dim": D}
        return (
            KeyPages.allocate(self.config, **sizes, device=device),
            ValuePages.allocate(self.config, **sizes, device=device),
        )

    @cached_property
    def kernels(self) -> LayerKernels:
        """The layer on Triton kernels, which ``check_kernels`` has accepted."""
        from kvq_runtime.layer_kernels import LayerKernels

        return LayerKernels(
            self.parameters,
            self.config,
            device=self.device,
            workspace=self.workspace or Workspace(),
        )

    def encode(
        self, keys: Tensor, values: Tensor, *, impl: ImplementationName = "reference"
    ) -> tuple[KeyPages, ValuePages]:
        """Quantize and pack; see ``kvq_formats.pages``."""
        if impl == "triton":
            return self.kernels.encode(keys, values)
        return (
            pages.encode_keys(keys.float(), self.parameters.key, self.config),
            pages.encode_values(values.float(), self.parameters.value, self.config),
        )

    def decode_keys(self, key_pages: KeyPages) -> Tensor:
        """f32 ``[P, H, 256, D]``, before RoPE."""
        return self.keys.dequantize(key_pages)

    def decode_values(self, value_pages: ValuePages) -> tuple[Tensor, Tensor, Tensor]:
        """f32 ``[P, H, D, 256]`` in units of half-range; half-range and centre ``[P, S, 256]``."""
        return self.values.dequantize(value_pages)

    def to(self, device: torch.device) -> SidecarPageCodec:
        """The same with its tables on ``device``."""
        return SidecarPageCodec(
            self.parameters,
            self.config,
            self._rotary,
            device=device,
            workspace=self.workspace,
        )


def page_codecs(model: PreTrainedModel, sidecar: Sidecar) -> dict[int, PageCodec]:
    """A codec for each quantized layer of ``model``.

    Raises UnsupportedModelError where the model's rotation is not understood.
    """
    rotaries: Mapping[int, LayerRotary] = learn_rotary(model, sidecar.rotary_channels)
    codecs: dict[int, PageCodec] = {}
    workspace = Workspace()
    for layer_idx, layer in sidecar.layers.items():
        rotary = rotaries[layer_idx]
        ordered = replace(layer, key=_reordered(layer.key, rotary.order))
        config = sidecar.config.for_layer(layer_idx)
        codecs[layer_idx] = SidecarPageCodec(ordered, config, rotary, workspace=workspace)
    return codecs


def check_kernels(codecs: Mapping[int, PageCodec], shape: Fingerprint) -> None:
    """Raises KVQError where Triton kernels cannot hold a layer of a model of ``shape``."""
    from kvq_kernels.kernel_tables import check_layer

    for codec in codecs.values():
        assert isinstance(codec, SidecarPageCodec)
        check_layer(
            codec.parameters,
            codec.rotary.angles(),
            group_size=shape.num_attention_heads // shape.num_kv_heads,
        )


def unrotated_codecs(sidecar: Sidecar) -> dict[int, SidecarPageCodec]:
    """Codecs that tell shapes and bytes without a model."""
    return {
        layer_idx: SidecarPageCodec(layer, sidecar.config.for_layer(layer_idx), None)
        for layer_idx, layer in sidecar.layers.items()
    }


def _reordered(parameters: KeyParameters, order: Tensor) -> KeyParameters:
    feedback = parameters.feedback
    return replace(
        parameters,
        center=parameters.center[:, order].contiguous(),
        half_range=parameters.half_range[:, order].contiguous(),
        feedback=feedback and feedback.reordered(order),
    )
