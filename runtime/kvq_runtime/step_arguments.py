"""Which forwards of a model a captured step stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvq_runtime.cache import PackedCache, packed_layers
from kvq_runtime.decode_step import DecodeStep
from kvq_runtime.rows import Row

READ = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values"})
AS_GIVEN: Mapping[str, tuple[object, ...]] = {
    "use_cache": (True,),
    "return_dict": (True,),
    "logits_to_keep": (0, 1),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "is_first_iteration": (False,),
}
"""Options and what a captured step does about them; None is never another wish."""


class StepArguments:
    """Tells the forwards that go on by one token a row, where the cache stands, from all others."""

    def __init__(self, cache: PackedCache, step: DecodeStep) -> None:
        self._cache = cache
        self._step = step
        self._layer = next(packed_layers(cache))
        self._attended: Tensor | None = None
        self._attended_of: object = None

    def token_ids(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """Ids of a forward that a captured step stands for; None if another forward was asked for.

        Waits for the device once, where positions or a mask are passed, to compare them with those
        that the step goes by. ``generate`` waits for each token anyway.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape != self._step.token_ids.shape:
            return None
        if given.get("past_key_values") is not self._cache:
            return None
        for name, value in given.items():
            if name not in READ and not any(value is known for known in AS_GIVEN.get(name, ())):
                return None
        rows, slots = self._layer.rows, self._layer.slots
        if len(rows) != len(ids):
            return None
        self._step.follow(rows)
        differs = []
        positions = given.get("position_ids")
        if positions is None:
            # A model then counts slots, padding among them.
            if any(row.positions.next(row.tokens) != slots for row in rows):
                return None
        elif positions.shape not in ((1, 1), ids.shape):
            return None
        else:
            differs.append((positions != self._step.position_ids).any())
        if (mask := given.get("attention_mask")) is not None:
            if not isinstance(mask, Tensor) or mask.shape != (len(ids), slots + 1):
                return None
            differs.append((mask.bool() != self._expected(rows, slots)[:, : slots + 1]).any())
        if differs and bool(torch.stack(differs).any()):
            return None
        return ids

    def _expected(self, rows: list[Row], slots: int) -> Tensor:
        """Bool ``[B, capacity]`` on the device: slots that are attended, and all after the last."""
        # While tokens follow each other the mask of all that come is the same.
        spans = tuple(
            tuple((start, None if stop == slots else stop) for start, stop in row.attended)
            for row in rows
        )
        if self._attended is None or spans != self._attended_of:
            expected = torch.zeros(len(rows), self._layer.get_max_length(), dtype=torch.bool)
            expected[:, slots:] = True
            for place, row in enumerate(rows):
                for start, stop in row.attended:
                    expected[place, start:stop] = True
            self._attended = expected.to(self._step.token_ids.device)
            self._attended_of = spans
        return self._attended
