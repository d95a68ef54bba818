"""A stock model whose rotary angles are exact: the truth that two ways of rounding are held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_kernels.rotary import RotaryAngles
from kvq_runtime.rope import AttentionTap, RotaryCall
from kvq_runtime.rotary_layout import LayerRotary, learn_rotary


class ExactAngles(AttentionTap):
    """Rotates by angles that are exact, in the dtype of the model; positions i64 ``[B, T]``."""

    def __init__(
        self,
        model: PreTrainedModel,
        positions: Tensor,
        channels: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self.rotary = learn_rotary(model, channels)
        self.positions = positions

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        rotary = self.rotary.get(call.layer_idx)
        if rotary is None:
            return call.rotate(call.query, call.key)
        return self.rotated(call.query, rotary), self.rotated(call.key, rotary)

    def rotated(self, x: Tensor, rotary: LayerRotary) -> Tensor:
        """``[B, heads, T, R]``, of the channels that the model hands to its rotary function."""
        angles: RotaryAngles = rotary.angles()
        turn = self.positions[:, None, :, None].double() * angles.frequencies
        cos, sin = turn.cos() * angles.scaling, turn.sin() * angles.scaling
        start, stop = rotary.channels
        # Of the order of all channels, those within the part come first, and no others among them.
        order = rotary.order[: stop - start] - start
        half = rotary.rotary_dim // 2
        x1, x2, rest = x[..., order].split([half, half, x.shape[-1] - 2 * half], dim=-1)
        turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)
        return turned[..., order.argsort()].to(x.dtype)
