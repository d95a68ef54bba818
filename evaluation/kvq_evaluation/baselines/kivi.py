"""KIVI: keys a channel in groups of tokens, values a token in groups of channels.

Liu et al., ICML 2024, arXiv 2402.02750, sections 3 and 4. Their code (jy-yuan/KIVI,
``quant/new_pack.py``) takes the minimum of a group as zero and ``(max - min) / (2**bits - 1)`` as
scale, both fp16, on keys after RoPE, in groups of 32. The paper's residual, the last 128 tokens in
fp16, is ``recent_tokens``; none by default, so that every method is given the same windows. Their
kernels pack 2, 4 and 8 bits only; 3 bits are counted here as if they packed densely.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kvq_evaluation.baselines import uniform


@dataclass(frozen=True)
class Kivi:
    """Uniform codes in groups that run along tokens (keys) or along channels (values).

    Under the evaluation rule the keys of the incomplete last group are quantized as a shorter
    group of their own.

    Fields:
        bits: width of a code, keys and values alike, 1 to 8; another raises ConfigError.
        layers: the layers whose cache is quantized.
        group: tokens (keys) and channels (values) that share a scale and zero. A head that it does
            not divide ends in a shorter group.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    bits: int
    layers: Collection[int]
    group: int = 32
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=self.bits, group=self.group)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to: groups of tokens, channel by channel."""
        return self._round_trip(keys.mT).mT.contiguous()

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to: groups of channels, token by token."""
        return self._round_trip(values)

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``bits + 32 / group`` where groups are complete; sinks and the residual at 16 bits."""
        coded_tokens = self.group if tokens is None else uniform.coded_tokens(self, tokens)
        coded = (self._bits_along(coded_tokens) + self._bits_along(head_dim)) / 2
        return uniform.with_exact_tokens(coded, self, tokens=tokens)

    def _bits_along(self, numbers: int) -> float:
        allocated = uniform.allocated_bytes(numbers, bits=self.bits, group=self.group)
        return 8 * allocated / numbers

    def _round_trip(self, vectors: Tensor) -> Tensor:
        return uniform.by_group(
            vectors, group=self.group, quantize=partial(uniform.round_trip, bits=self.bits)
        )
