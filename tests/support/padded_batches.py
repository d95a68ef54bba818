"""Texts of two rows, the first left-padded, fed to a model in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def batch(T: int, padding: int, *, vocabulary: int = 199) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions of two rows, the first left-padded."""
    ids = torch.randint(3, vocabulary, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def fed(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    chunks: Sequence[int],
    cache: Any = None,
) -> tuple[Tensor, Any]:
    """Logits of all tokens, fed in ``chunks``, and the cache that holds them."""
    logits, start = [], 0
    for size in chunks:
        stop = start + size
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        cache, start = out.past_key_values, stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), cache
