"""What each layer of a stock model does with its keys and values, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvq_runtime.rope import AttentionCall, AttentionTap
from kvq_runtime.rotary_channels import RotaryChannels, find_channels

TOLD_OPTIONS = ("softcap", "s_aux", "sliding_window")
"""Options of attention that are told of a layer."""


@dataclass(frozen=True)
class ObservedCall:
    """One call of attention.

    Fields:
        output: ``[B, T, HQ, D]``.
        largest_score: of a query and a key, in magnitude, before any cap: the product of the
            largest lengths, times the scale.
        largest_value: in magnitude.
        keys: tokens that were attended over, S.
    """

    output: Tensor
    largest_score: float
    largest_value: float
    keys: int


@dataclass
class Observations:
    """What was seen of a model, by layer index.

    Fields:
        shapes: (heads, channels) of the keys and of the values.
        channels: of the keys that go through RoPE; None where that was not found out.
        options: names of ``TOLD_OPTIONS`` that were given.
        calls: of each (forward, layer).
    """

    shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)
    channels: dict[int, RotaryChannels | None] = field(default_factory=dict)
    options: dict[int, tuple[str, ...]] = field(default_factory=dict)
    calls: dict[tuple[int, int], ObservedCall] = field(default_factory=dict)


class ObservingTap(AttentionTap):
    """Changes nothing, and remembers."""

    def __init__(self) -> None:
        self.observations = Observations()
        self.forwards = 0

    def on_forward(self, arguments: Mapping[str, Any]) -> None:
        """Count."""
        self.forwards += 1

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend as the model does."""
        output, weights = call.attend(call.query, call.key, call.value)
        seen, index = self.observations, call.layer_idx
        if index not in seen.shapes:
            # The first forward holds nothing before its own keys.
            key, value = ((x.shape[1], x.shape[-1]) for x in (call.key, call.value))
            seen.shapes[index] = key, value
            seen.channels[index] = find_channels(call.rotated_key, call.key)
            seen.options[index] = tuple(
                name for name in TOLD_OPTIONS if call.options.get(name) is not None
            )
        scaling = call.options.get("scaling")
        scale = call.query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        lengths = [float(x.norm(dim=-1).max()) for x in (call.query, call.key)]
        seen.calls[self.forwards, index] = ObservedCall(
            output=output,
            largest_score=abs(scale) * lengths[0] * lengths[1],
            largest_value=float(call.value.abs().max()),
            keys=call.key.shape[2],
        )
        return output, weights
