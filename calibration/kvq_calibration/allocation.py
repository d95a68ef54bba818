"""Which layer's keys and values get how many bits: the least expected loss under an average.

What a width costs differs by orders of magnitude from layer to layer, and keys and values of all
layers take the same room, so the choice is a knapsack with few weights, which dynamic programming
solves exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from kvq_formats.config import Bits, KVQConfig
from kvq_formats.errors import ConfigError

Kind = Literal["key", "value"]
WIDTHS: tuple[int, ...] = get_args(Bits)

Losses = Mapping[tuple[int, Kind], Mapping[int, float]]
"""(layer_idx, what) -> width -> expected loss."""


def check_average(average_bits: float, config: KVQConfig) -> None:
    """Raise ConfigError for an average that no allocation has, or with nothing to allocate by."""
    if not (math.isfinite(average_bits) and min(WIDTHS) <= average_bits <= max(WIDTHS)):
        raise ConfigError(
            f"average_bits is {average_bits:g}, expected {min(WIDTHS)} to {max(WIDTHS)}.",
            hint="--average-bits 2.75",
        )
    if config.sensitivity == "none":
        raise ConfigError(
            "average_bits needs sensitivity to choose widths by, but sensitivity is 'none'.",
            hint="--sensitivity fisher, or --bits instead of --average-bits",
        )


def budget(tensors: int, average_bits: float) -> int:
    """Bits that the widths of ``tensors`` tensors may add up to."""
    # A hair of room, so that 2.8 of 10 tensors are 28 bits whatever the product rounds to.
    return math.floor(average_bits * tensors * (1 + 1e-12))


def even_widths(layers: Sequence[int], average_bits: float) -> dict[int, tuple[int, int]]:
    """Widths as equal as the average allows: they take as many bits as any allocation will."""
    bits, extra = divmod(budget(2 * len(layers), average_bits), 2 * len(layers))
    widths = [bits + (place < extra) for place in range(2 * len(layers))]
    return dict(zip(layers, zip(widths[::2], widths[1::2], strict=True), strict=True))


def allocate(losses: Losses, average_bits: float) -> dict[int, tuple[int, int]]:
    """(key_bits, value_bits) of each layer, of the least total loss within the average.

    ``average_bits`` is 2 to 4. Exact: all sums of widths are tried; of equal losses the one with
    fewer bits wins.
    """
    tensors = sorted(losses)
    room = budget(len(tensors), average_bits)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for place, tensor in enumerate(tensors, 1):
        least_left = (len(tensors) - place) * min(WIDTHS)
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (loss, widths) in sorted(best.items()):
            for width in WIDTHS:
                total, bits = loss + losses[tensor][width], used + width
                if bits + least_left > room:
                    continue
                if bits not in following or total < following[bits][0]:
                    following[bits] = (total, (*widths, width))
        best = following
    _, (_, widths) = min(best.items(), key=lambda item: (item[1][0], item[0]))
    chosen = dict(zip(tensors, widths, strict=True))
    layers = sorted({layer for layer, _ in tensors})
    return {layer: (chosen[layer, "key"], chosen[layer, "value"]) for layer in layers}
