"""Which layers are quantized, what stays as it is and why; equal layers are told together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvq_cli.checks.check import Check

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from kvq_runtime.examine import ExaminedLayer
    from kvq_runtime.rotary_channels import RotaryChannels

SPECIAL = {"softcap": "capped scores", "s_aux": "learned sinks"}
"""Options of attention that kvq honours, and what people call them."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are alike.

    Fields:
        layers: their indices.
        kind: as transformers makes caches by.
        quantized: whether their cache is packed.
        rotary_channels: ``[start, stop)`` of a key that the model hands to its rotary function, as
            sidecars have it; None if it is not packed.
        rotated: those of them that are turned.
        head_dim: channels of a key.
        window: tokens that they attend to; None for all.
        special: what else their attention does.
    """

    layers: tuple[int, ...]
    kind: str
    quantized: bool
    rotary_channels: tuple[int, int] | None
    rotated: tuple[int, ...]
    head_dim: int
    window: int | None
    special: tuple[str, ...]

    def row(self) -> tuple[str, str, str, str, str]:
        """For people."""
        return (
            ranges(self.layers),
            self.kind,
            "quantized" if self.quantized else "as it is",
            self.keys,
            ", ".join([*self.special, *([self.reason] if self.reason else [])]),
        )

    @property
    def keys(self) -> str:
        """What RoPE does to their keys."""
        if self.rotary_channels is None:
            return ""
        if not self.rotated:
            return "no RoPE"
        part = "" if len(self.rotated) == self.head_dim else f" of {self.head_dim}"
        return f"channels {ranges(self.rotated)}{part} rotated"

    @property
    def reason(self) -> str | None:
        """Why they stay as they are, or what limits them."""
        if self.window is not None:
            window = f"attends to {self.window:,} tokens"
            return f"{window}: for texts within" if self.quantized else f"{window}: does not grow"
        return None if self.quantized else "a state that does not grow"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "layers": list(self.layers),
            "kind": self.kind,
            "quantized": self.quantized,
            "rotary_channels": list(self.rotary_channels) if self.rotary_channels else None,
            "rotary_dim": None if self.rotary_channels is None else len(self.rotated),
            "window": self.window,
            "special": list(self.special),
            "reason": self.reason,
        }


def group_layers(
    examined: Sequence[ExaminedLayer],
    *,
    rotated: Mapping[int, tuple[int, ...]],
    windows: Mapping[int, int],
    head_dim: int,
) -> list[LayerGroup]:
    """Put layers that are alike together, in the order in which they come first.

    Args:
        examined: all layers.
        rotated: channels that are turned, of each layer that is quantized.
        windows: tokens that a layer attends to, where it is not all.
        head_dim: channels of a key.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer in examined:
        special = tuple(SPECIAL[name] for name in layer.options if name in SPECIAL)
        index = layer.layer_idx
        channels = (layer.rotary_channels, rotated.get(index, ()), head_dim)
        alike = (layer.kind, layer.quantized, *channels, windows.get(index), special)
        groups.setdefault(alike, []).append(index)
    return [LayerGroup(tuple(layers), *alike) for alike, layers in groups.items()]


def layer_windows(config: PreTrainedConfig) -> dict[int, int]:
    """Tokens that a layer attends to, by layer index; layers that see everything are not in it."""
    from kvq_runtime.cache import cache_layers
    from kvq_runtime.supported_models import layer_types

    return {
        layer_idx: window
        for layer_idx, (kind, layer) in enumerate(
            zip(layer_types(config), cache_layers(config, {}), strict=True)
        )
        if kind != "full_attention" and (window := layer.get_max_length()) > 0
    }


def rotated_channels(
    miniature: PreTrainedModel, channels: Mapping[int, RotaryChannels]
) -> dict[int, tuple[int, ...]]:
    """Channels of a key that are turned, by layer: a model may hand on more than it turns."""
    from kvq_runtime.rotary_channels import UNROTATED
    from kvq_runtime.rotary_layout import learn_rotary

    return {
        layer_idx: ()
        if rotary.channels == UNROTATED
        else tuple(sorted(rotary.order[: rotary.rotary_dim].tolist()))
        for layer_idx, rotary in learn_rotary(miniature, channels).items()
    }


def check_attention(groups: Sequence[LayerGroup]) -> Check:
    """One sentence about layers that were tried and are understood."""
    quantized = [group for group in groups if group.quantized]
    total = sum(len(group.layers) for group in groups)
    count = sum(len(group.layers) for group in quantized)
    parts = [f"{count} quantized"]
    if len(keys := {group.keys for group in quantized}) == 1:
        whole = len(quantized[0].rotated) == quantized[0].head_dim
        parts.append("all channels rotated" if whole else keys.pop())
    elif bare := sum(len(group.layers) for group in quantized if not group.rotated):
        parts.append(f"{bare} of them without RoPE")
    for group in groups:
        if not group.quantized:
            kept = "a state" if group.window is None else f"a sliding window of {group.window:,}"
            keep = "keep" if len(group.layers) > 1 else "keeps"
            parts.append(f"{len(group.layers)} {keep} {kept}")
    limits = {group.window for group in quantized} - {None}
    if limits:
        parts.append(f"for texts of up to {limits.pop():,} tokens")
    return Check("attention", "pass", f"{total} layers: {', '.join(parts)}")


def check_drift(examined: Sequence[ExaminedLayer]) -> Check:
    """How well a miniature did on packed pages that lose nothing; worse ones were refused."""
    drifts = {layer.layer_idx: layer.drift for layer in examined if layer.drift is not None}
    worst = max(drifts, key=lambda layer_idx: drifts[layer_idx])
    return Check(
        "drift",
        "pass",
        f"on lossless packed pages a miniature is off by at most {drifts[worst]:.2g} of what "
        f"rounding explains (layer {worst})",
    )


def ranges(numbers: Sequence[int]) -> str:
    """``0-35``, ``1, 3, ..., 35`` or ``0-4, 6-10``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    if len(steps) == 1 and steps != {1} and len(numbers) > 3:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
