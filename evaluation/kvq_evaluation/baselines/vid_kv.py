"""VidKV: keys of 1.5 bits, by channel, and ternary values, also by channel; made for video tokens.

Tao et al., arXiv 2503.16257; code: KD-TAO/VidKV, ``transformers/src/transformers``
(``cache_utils.py``, ``vidkv_quant.py``), whose steps these are:

- keys after RoPE: the half of a head's channels with the widest range over all tokens and heads,
  one choice a layer, has uniform codes of 2 bits; of the other half each token is Fourier
  transformed along its channels, and real and imaginary parts keep their sign, times the mean
  magnitude of the group;
- values: ternary, 0 up to half the group's mean magnitude, else the mean with its sign;
- groups are 32 tokens of a channel; the last one is shorter here, where the code keeps it fp16.

At the commit read (7e5b0ef) decoding drops the ternary scale and gives signs as 0 and 1; both are
taken as slips. It stores both halves of a spectrum, and 2 bits a ternary digit; counted is what
would do: half of it, the other being its conjugate, and five digits a byte.

Channels are chosen by the whole text, which favours this method. The residual of 128 tokens is
``recent_tokens``. Values of salient video tokens at 2 bits (STP) are left out: text has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_formats.errors import ConfigError

SCALE_BYTES = 2
DIGITS_A_BYTE = 5


@dataclass(frozen=True)
class VidKV:
    """Keys and values in groups of tokens, channel by channel. Any head_dim.

    Fields:
        layers: the layers whose cache is quantized.
        key_bits: 1 plus the share of channels at 2 bits, 1 to 2; another raises ConfigError.
        group: tokens that share a scale.
        sink_tokens, recent_tokens: kept exact, as in ``KVQConfig``.
        rotated_keys: whether keys are quantized after RoPE, as this method does, or before.
    """

    layers: Collection[int]
    key_bits: float = 1.5
    group: int = 32
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = True

    def __post_init__(self) -> None:
        uniform.check_options(bits=2, group=self.group)
        if not 1 <= self.key_bits <= 2:
            raise ConfigError(f"key_bits is {self.key_bits}; expected 1 to 2.", hint="key_bits=1.5")

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        if keys.shape[1] == 0:
            return keys
        wide = self._wide_channels(keys)
        decoded = torch.empty_like(keys, memory_format=torch.contiguous_format)
        decoded[..., wide] = self._by_channel(keys[..., wide], partial(uniform.round_trip, bits=2))
        normal = keys[..., ~wide]
        if normal.shape[-1]:
            parts = torch.view_as_real(torch.fft.rfft(normal)).flatten(-2)
            parts = self._by_channel(parts, binary).unflatten(-1, (-1, 2))
            spectrum = torch.view_as_complex(parts.contiguous())
            decoded[..., ~wide] = torch.fft.irfft(spectrum, n=normal.shape[-1])
        return decoded

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """What the codes of f32 ``[H, T, D]`` decode to."""
        return self._by_channel(values, ternary).contiguous()

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """``key_bits`` and 1.6, 32 or 16 bits a group, and a layer's choice of channels."""
        length = DIGITS_A_BYTE * self.group
        if tokens is not None:
            length = uniform.coded_tokens(self, tokens)
        wide = uniform.allocated_bytes(length, bits=2, group=self.group)
        normal = uniform.allocated_bytes(length, bits=1, group=self.group, metadata=SCALE_BYTES)
        count = self._num_wide(head_dim)
        key_bytes = num_kv_heads * (count * wide + (head_dim - count) * normal)
        if tokens is not None:
            key_bytes += -(-head_dim // 8)
        value_bytes = -(-length // DIGITS_A_BYTE) + SCALE_BYTES * -(-length // self.group)
        coded = 4 * (key_bytes / (num_kv_heads * head_dim) + value_bytes) / length
        return uniform.with_exact_tokens(coded, self, tokens=tokens)

    def _num_wide(self, head_dim: int) -> int:
        return int(head_dim * (self.key_bits - 1))

    def _wide_channels(self, keys: Tensor) -> Tensor:
        """Bool ``[D]``, the channels of f32 ``[H, T, D]`` at 2 bits."""
        reach = keys.amax(dim=(0, 1)) - keys.amin(dim=(0, 1))
        widest = reach.argsort(descending=True, stable=True)[: self._num_wide(len(reach))]
        return torch.zeros_like(reach, dtype=torch.bool).scatter(0, widest, True)

    def _by_channel(self, vectors: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return uniform.by_group(vectors.mT, group=self.group, quantize=quantize).mT


def binary(vectors: Tensor) -> Tensor:
    """The sign, + for 0, times the mean magnitude in fp16, of each f32 ``[..., G]``."""
    scale = vectors.abs().mean(dim=-1, keepdim=True).half().float()
    return torch.where(vectors >= 0, scale, -scale)


def ternary(vectors: Tensor) -> Tensor:
    """-1, 0 or 1 times the mean magnitude in fp16 of each f32 ``[..., G]``; 0 up to its half."""
    mean = vectors.abs().mean(dim=-1, keepdim=True)
    digits = vectors.sign() * (vectors.abs() > mean / 2)
    return digits * mean.half().float()
