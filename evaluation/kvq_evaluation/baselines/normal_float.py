"""NormalFloat: the quantiles of a normal distribution as codebook, scaled to a block's largest.

QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314), section 3 and appendix E, defines NF4: of
the 16 entries 9 are normal quantiles at equal steps of probability from 1/2 to ``1 - delta`` and 8
mirror such steps, the zero shared, with ``delta = (1/32 + 1/30) / 2`` (bitsandbytes,
``functional.create_normal_map``). Here ``2**bits`` stands for the 16: ``2**(bits-1) + 1`` and
``2**(bits-1)`` entries, ``delta = (1/(2 * 2**bits) + 1/(2 * (2**bits - 1))) / 2``. Blocks are 64
numbers, as there. Their scale takes fp16 here; bitsandbytes keeps 32 bits a block. KVQuant's own
``nf`` baseline (``quant_fn_nf``) keeps NF4's delta at every width and centres each vector first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform

SCALE_BYTES = 2
"""An fp16 scale beside the codes of a block."""


@dataclass(frozen=True)
class NormalFloat:
    """Keys after RoPE and values, blocks of each token's head quantized by themselves.

    Fields:
        bits: width of a code, 2 to 8; another raises ConfigError.
        layers: the layers whose cache is quantized.
        group: channels that share a scale. A head that it does not divide ends in a shorter block.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    layers: Collection[int]
    group: int = 64
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, group=self.group, fewest_bits=2)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return uniform.by_group(keys, group=self.group, quantize=self._round_trip)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return uniform.by_group(values, group=self.group, quantize=self._round_trip)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 16 / group`` where blocks fill the head; sinks and recent tokens at 16."""
        allocated = uniform.allocated_bytes(
            head_dim, bits=self.bits, group=self.group, metadata=SCALE_BYTES
        )
        return uniform.with_exact_tokens(8 * allocated / head_dim, self, tokens=tokens)

    def _round_trip(self, blocks: Tensor) -> Tensor:
        entries = codebook(self.bits).to(blocks.device)
        scale = blocks.abs().amax(dim=-1, keepdim=True).half().float()
        normalised = blocks / scale.masked_fill(scale == 0, 1.0)
        codes = torch.bucketize(normalised, (entries[1:] + entries[:-1]) / 2)
        return entries[codes] * scale


@lru_cache(maxsize=8)
def codebook(bits: int) -> Tensor:
    """NormalFloat's entries, f32 ``[2**bits]``, increasing from -1 to 1 with an exact zero."""
    half = 2 ** (bits - 1)
    delta = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    positive, negative = (
        torch.special.ndtri(torch.linspace(0.5, 1 - delta, count, dtype=torch.float64))
        for count in (half + 1, half)
    )
    return (torch.cat([-negative[1:].flip(0), positive]) / positive[-1]).float()
