"""Pages that hold their numbers as they are: a packed cache without its losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.rope import attention_modules
from kvq_runtime.rotary_layout import LayerRotary, learn_rotary


@dataclass(frozen=True)
class ExactKeyPages:
    numbers: Tensor
    base_positions: Tensor


@dataclass(frozen=True)
class ExactValuePages:
    numbers: Tensor


@dataclass
class ExactPageCodec:
    """Decodes to ``scale`` times the truth; 1 changes nothing."""

    rotary: LayerRotary
    num_kv_heads: int
    head_dim: int
    sink_tokens: int = 1
    recent_tokens: int = 0
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    encoded: list[Tensor] = field(default_factory=list)

    def allocate(
        self, num_pages: int, *, device: torch.device | str
    ) -> tuple[ExactKeyPages, ExactValuePages]:
        P, H, D = num_pages, self.num_kv_heads, self.head_dim
        key = torch.zeros(P, H, PAGE_TOKENS, D, dtype=self.dtype, device=device)
        value = torch.zeros(P, H, D, PAGE_TOKENS, dtype=self.dtype, device=device)
        base = torch.zeros(P, dtype=torch.int32, device=device)
        return ExactKeyPages(key, base), ExactValuePages(value)

    def encode(
        self, keys: Tensor, values: Tensor, *, impl: str = "reference"
    ) -> tuple[ExactKeyPages, ExactValuePages]:
        assert impl == "reference"
        H, T, D = keys.shape
        self.encoded.append(keys)
        paged = [
            x.reshape(H, T // PAGE_TOKENS, PAGE_TOKENS, D).transpose(0, 1).to(self.dtype)
            for x in (keys, values)
        ]
        base = torch.zeros(T // PAGE_TOKENS, dtype=torch.int32, device=keys.device)
        return ExactKeyPages(paged[0], base), ExactValuePages(paged[1].mT.contiguous())

    def decode_keys(self, key_pages: Any) -> Tensor:
        return key_pages.numbers.float() * self.scale

    def decode_values(self, value_pages: Any) -> tuple[Tensor, None, None]:
        return value_pages.numbers.float() * self.scale, None, None

    def to(self, device: torch.device) -> ExactPageCodec:
        return self


def exact_codecs(model: PreTrainedModel, **options: Any) -> dict[int, ExactPageCodec]:
    """One for each layer that kvq would quantize."""
    config = model.config.get_text_config(decoder=True)
    codecs = {}
    for layer_idx, rotary in learn_rotary(model).items():
        module = attention_modules(model)[layer_idx]
        codecs[layer_idx] = ExactPageCodec(
            rotary=rotary,
            num_kv_heads=config.num_key_value_heads,
            head_dim=int(module.head_dim),
            **options,
        )
    return codecs
