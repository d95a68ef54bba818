"""What the fast path keeps in registers of a layer: codebooks as bytes, scale and zero of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvq_formats.codebook import Codebook
    from kvq_formats.config import KVQConfig
    from kvq_formats.parameters import LayerParameters

COPIES = 8
"""Of each word, one for each group of four lanes (``layouts.each_lane``)."""


@dataclass(frozen=True, eq=False)
class LookupTables:
    """One layer's lookups. Channels are in rotary channel order.

    Fields:
        key_lookup, value_lookup: i32 ``[words, COPIES]``, four bytes a word. Of keys of 2 and 3
            bits the low bytes of all entries in f16, then the high bytes; else levels.
        key_scale, key_zero: f16 ``[H, D]``; a key is ``scale * number + zero``.
        value_step, value_offset: a value's entry is ``offset + step * level``.
    """

    key_lookup: Tensor
    value_lookup: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_step: float
    value_offset: float

    @classmethod
    def of(
        cls, parameters: LayerParameters, config: KVQConfig, *, device: torch.device | str
    ) -> LookupTables:
        """Convert what ``kernel_tables.check_layer`` accepts."""
        key, value = parameters.key, parameters.value.codebook
        scale, zero = key.half_range.float(), key.center.float()
        if config.key_bits == 4:
            key_words = level_words(key.codebook)
            # What is looked up is the level: offset and step go to zero and scale.
            zero = zero + scale * key.codebook.offset
            scale = scale * key.codebook.step
        else:
            key_words = entry_words(key.codebook)
        return cls(
            key_lookup=_copied(key_words).to(device),
            value_lookup=_copied(level_words(value)).to(device),
            key_scale=scale.half().contiguous().to(device),
            key_zero=zero.half().contiguous().to(device),
            value_step=value.step,
            value_offset=value.offset,
        )


def level_words(codebook: Codebook) -> Tensor:
    """Levels, i32 ``[entries / 4]``."""
    return codebook.levels.cpu().contiguous().view(torch.int32)


def entry_words(codebook: Codebook) -> Tensor:
    """Low bytes of the entries in f16, then high bytes, i32 ``[entries / 2]``."""
    both = codebook.decode_entries.cpu().half().view(torch.uint8).view(-1, 2)
    return both.T.contiguous().view(-1).view(torch.int32)


def _copied(words: Tensor) -> Tensor:
    return words[:, None].repeat(1, COPIES).contiguous()
