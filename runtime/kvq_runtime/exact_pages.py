"""Pages that hold their numbers as they are: a packed cache without its losses.

With them a model on packed pages must do what the stock model does, up to roundings: what differs
is not quantization but something that kvq has not understood (the identity path).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.fingerprint import Fingerprint
from kvq_runtime.rotary_channels import RotaryChannels
from kvq_runtime.rotary_layout import LayerRotary, learn_rotary
from kvq_runtime.supported_models import text_config


@dataclass(frozen=True)
class ExactKeyPages:
    """``numbers``: ``[P, H, 256, D]``; ``base_positions``: as in ``KeyPages``."""

    numbers: Tensor
    base_positions: Tensor


@dataclass(frozen=True)
class ExactValuePages:
    """``numbers``: ``[P, H, D, 256]``."""

    numbers: Tensor


@dataclass
class ExactPageCodec:
    """A ``PageCodec`` that loses nothing; for the reference implementation only.

    Fields:
        dtype: in which pages hold their numbers.
    """

    rotary: LayerRotary
    num_kv_heads: int
    head_dim: int
    sink_tokens: int = 1
    recent_tokens: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def kernels(self) -> Any:
        """There are none."""
        raise NotImplementedError("exact pages are read by the reference implementation only")

    def allocate(
        self, num_pages: int, *, device: torch.device | str
    ) -> tuple[ExactKeyPages, ExactValuePages]:
        """Pages of zeros."""
        P, H, D = num_pages, self.num_kv_heads, self.head_dim
        key = torch.zeros(P, H, PAGE_TOKENS, D, dtype=self.dtype, device=device)
        value = torch.zeros(P, H, D, PAGE_TOKENS, dtype=self.dtype, device=device)
        base = torch.zeros(P, dtype=torch.int32, device=device)
        return ExactKeyPages(key, base), ExactValuePages(value)

    def encode(
        self, keys: Tensor, values: Tensor, *, impl: str = "reference"
    ) -> tuple[ExactKeyPages, ExactValuePages]:
        """Pages of ``[H, P * 256, D]`` keys and values."""
        H, T, D = keys.shape
        paged = [
            x.reshape(H, T // PAGE_TOKENS, PAGE_TOKENS, D).transpose(0, 1).to(self.dtype)
            for x in (keys, values)
        ]
        base = torch.zeros(T // PAGE_TOKENS, dtype=torch.int32, device=keys.device)
        return ExactKeyPages(paged[0], base), ExactValuePages(paged[1].mT.contiguous())

    def decode_keys(self, key_pages: ExactKeyPages) -> Tensor:
        """f32 ``[P, H, 256, D]``, a copy: attention rotates in place."""
        return key_pages.numbers.to(torch.float32, copy=True)

    def decode_values(self, value_pages: ExactValuePages) -> tuple[Tensor, None, None]:
        """f32 ``[P, H, D, 256]``, with nothing to scale by."""
        return value_pages.numbers.to(torch.float32, copy=True), None, None

    def to(self, device: torch.device) -> Self:
        """The same: it has no tables."""
        return self


def exact_codecs(
    model: PreTrainedModel,
    channels: Mapping[int, RotaryChannels] | None = None,
    **options: Any,
) -> dict[int, ExactPageCodec]:
    """One for each layer that kvq would quantize; ``options`` are fields of ``ExactPageCodec``.

    Raises UnsupportedModelError as ``learn_rotary`` does.
    """
    shape = Fingerprint.from_config(text_config(model.config))
    return {
        layer_idx: ExactPageCodec(rotary, shape.num_kv_heads, shape.head_dim, **options)
        for layer_idx, rotary in learn_rotary(model, channels).items()
    }
