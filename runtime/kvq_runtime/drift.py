"""How far attention on packed pages is off from what the stock model did, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvq_runtime.observe import Observations, ObservedCall
from kvq_runtime.page_codec import PageCodec
from kvq_runtime.rope import AttentionCall
from kvq_runtime.rotary_layout import ROUNDINGS, LayerRotary
from kvq_runtime.runtime_rule import RuntimeTap

UNIT = 2.0**-24
"""A rounding to f32, relative."""


@dataclass(frozen=True)
class Drift:
    """Of one layer, at its worst.

    Fields:
        found: largest difference of an output.
        bound: what roundings explain.
    """

    found: float
    bound: float

    @property
    def relative(self) -> float:
        """``found`` in units of ``bound``; NaN where an output is NaN."""
        return self.found / self.bound


class ReplayTap(RuntimeTap):
    """The runtime rule, whose outputs are compared with observed ones and then replaced by them.

    So every layer gets what it got in the stock model, and the difference of one layer is its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codecs: Mapping[int, PageCodec],
        seen: Observations,
        *,
        angles_to: int,
    ) -> None:
        """``angles_to``: positions that occur are below it."""
        super().__init__(model, codecs, rule="runtime", impl="reference")
        self.seen = seen
        self.angles_to = angles_to
        self.drifts: dict[int, Drift] = {}
        self.forwards = 0

    def on_forward(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Count."""
        self.forwards += 1
        return super().on_forward(arguments)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend over packed pages, compare, and go on with what the stock model had."""
        output, weights = super().on_attention(call)
        codec = self.codecs.get(call.layer_idx)
        if codec is None:
            return output, weights
        stock = self.seen.calls[self.forwards, call.layer_idx]
        difference = (output - stock.output).abs()
        if self.attended is not None:
            difference = difference[self.attended]
        drift = Drift(
            found=float(difference.max()),
            bound=rounding_bound(stock, codec.rotary, head_dim=codec.head_dim, to=self.angles_to),
        )
        worst = self.drifts.get(call.layer_idx)
        if worst is None or not drift.relative <= worst.relative:
            self.drifts[call.layer_idx] = drift
        return stock.output, weights


def rounding_bound(call: ObservedCall, rotary: LayerRotary, *, head_dim: int, to: int) -> float:
    """How far two ways to compute one call of attention in f32 may differ.

    A query and a key are rotated by angles that are rounded, ``position * frequency`` by a relative
    ``2**-24``, and with ``ROUNDINGS`` more; their product sums D terms. That moves a score by
    ``2 (position * frequency + ROUNDINGS) + D + 4`` units of its largest magnitude, for both ways
    together, and a cap only makes it less. Softmax turns a difference of d into one of at most
    ``e**(2 d) - 1`` of all weights together, whose sum over S values rounds S + 8 times more in
    each of the two.
    """
    fastest = float(rotary.angles().frequencies.abs().max())
    units = 2 * (to * fastest + ROUNDINGS) + head_dim + 4
    score = call.largest_score * units * UNIT
    return (math.expm1(2 * score) + 2 * (call.keys + 8) * UNIT) * call.largest_value
