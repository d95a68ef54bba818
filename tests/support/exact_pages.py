"""Exact pages that tests may also scale, and look at as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvq_runtime import exact_pages
from kvq_runtime.exact_pages import ExactKeyPages, ExactValuePages


@dataclass
class ExactPageCodec(exact_pages.ExactPageCodec):
    """Decodes to ``scale`` times the truth; 1 changes nothing."""

    scale: float = 1.0
    encoded: list[Tensor] = field(default_factory=list)

    def encode(
        self, keys: Tensor, values: Tensor, *, impl: str = "reference"
    ) -> tuple[ExactKeyPages, ExactValuePages]:
        assert impl == "reference"
        self.encoded.append(keys)
        return super().encode(keys, values, impl=impl)

    def decode_keys(self, key_pages: Any) -> Tensor:
        return super().decode_keys(key_pages) * self.scale

    def decode_values(self, value_pages: Any) -> tuple[Tensor, None, None]:
        return super().decode_values(value_pages)[0] * self.scale, None, None


def exact_codecs(
    model: PreTrainedModel, channels: Mapping[int, tuple[int, int]] | None = None, **options: Any
) -> dict[int, ExactPageCodec]:
    """One for each layer that kvq would quantize."""
    return {
        layer_idx: ExactPageCodec(codec.rotary, codec.num_kv_heads, codec.head_dim, **options)
        for layer_idx, codec in exact_pages.exact_codecs(model, channels).items()
    }
