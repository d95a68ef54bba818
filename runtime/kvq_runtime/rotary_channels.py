"""Which channels of a key go through RoPE: all, a part that the model cuts out first, or none.

Phi and StableLM split queries and keys, rotate one part and join them again; SmolLM3 and Cohere2
have layers that rotate nothing. It is seen, not known by name: the channels of the key that a layer
attends over are compared with what its rotary function returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_formats.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvq_runtime.rope import AttentionCall, RotaryCall

RotaryChannels = tuple[int, int]
"""Channels ``[start, stop)`` of a key that go through RoPE; (0, 0) where none does."""

UNROTATED: RotaryChannels = (0, 0)


def find_channels(rotated: Tensor | None, attended: Tensor) -> RotaryChannels | None:
    """Where in the keys that a layer attends over its rotary function's result is found.

    Args:
        rotated: ``[B, H, T, R]``, as the rotary function returned it; None if it was not called.
        attended: ``[B, H, T, D]``, of the same tokens.

    Returns None if it is nowhere: the model does something to its keys between RoPE and the cache.
    """
    if rotated is None:
        return UNROTATED
    if rotated is attended:
        return 0, attended.shape[-1]
    R, D = rotated.shape[-1], attended.shape[-1]
    if rotated.shape[:-1] != attended.shape[:-1] or rotated.dtype != attended.dtype:
        return None
    for start in range(D - R + 1):
        if _same(rotated, attended[..., start : start + R]):
            return start, start + R
    return None


def splice(x: Tensor, part: Tensor, channels: RotaryChannels) -> Tensor:
    """``x`` ``[..., D]`` with ``part`` ``[..., stop - start]`` in place of ``channels``."""
    start, stop = channels
    if stop - start == x.shape[-1]:
        return part
    return torch.cat([x[..., :start], part, x[..., stop:]], dim=-1)


def _same(one: Tensor, other: Tensor) -> bool:
    # NaN is something that others complain about, in better words.
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


@dataclass(frozen=True)
class KeyBeforeRope:
    """The keys that one layer attends over, as they were before RoPE.

    Fields:
        key: ``[B, H, T, D]``.
        channels: those that went through RoPE.
        rotary: the call that rotated them; None if none did.
    """

    key: Tensor
    channels: RotaryChannels
    rotary: RotaryCall | None

    def rotated(self, key: Tensor) -> Tensor:
        """Another key ``[B, H, T, D]``, rotated as the model does."""
        if self.rotary is None:
            return key
        start, stop = self.channels
        _, part = self.rotary.rotate(self.rotary.query, key[..., start:stop])
        return splice(key, part, self.channels)


def key_before_rope(call: AttentionCall) -> KeyBeforeRope:
    """What a layer that attends over the keys of this forward would have cached before RoPE.

    Raises UnsupportedModelError where the model changes its keys after RoPE.
    """
    channels = find_channels(call.rotated_key, call.key)
    if channels is None:
        raise UnsupportedModelError(
            f"layer {call.layer_idx} changes its keys between RoPE and attention (a norm, a scale "
            "or the like); kvq stores keys before RoPE and cannot follow."
        )
    if call.rotary is None:
        return KeyBeforeRope(call.key, channels, None)
    return KeyBeforeRope(splice(call.key, call.rotary.key, channels), channels, call.rotary)
