"""One token of each row of a packed layer, in a step that is captured once and replayed.

What is in the graph is ``put_token`` and the attention after it; ``prepare_token`` comes before a
replay and ``count_token`` after it, both by what the host knows.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from torch import Tensor

from kvq_runtime.decode_step import StepForward
from kvq_runtime.modes import plain_arithmetic

if TYPE_CHECKING:
    from kvq_runtime.layer import PackedLayer


def prepare_token(layer: PackedLayer) -> None:
    """Make room for one more token of each row: a tail that is full gives up its first page.

    Nothing waits for the device. Raises CacheFullError.
    """
    layer.check_room(1)
    layer.end_reading()
    layer.impl = "triton"
    for place, row in enumerate(layer.rows):
        if row.tail == layer.window:
            layer.torn = True
            with plain_arithmetic(layer.device):
                layer.pack_first(place)
            layer.torn = False


def put_token(
    layer: PackedLayer, key_states: Tensor, value_states: Tensor, forward: StepForward
) -> None:
    """Store one token of each row, ``[B, H, 1, D]``, where the device says."""
    with plain_arithmetic(layer.device):
        layer.exact.put(
            forward.places, key_states.detach(), value_states.detach(), forward.positions
        )


def count_token(layer: PackedLayer) -> None:
    """Count one more attended token of each row, at the position that comes next."""
    for row in layer.rows:
        tokens = row.tokens
        row.positions.extend(tokens, [(0, row.positions.next(tokens))])
        row.attend(layer.slots, layer.slots + 1)
        if row.sinks < layer.codec.sink_tokens:
            row.sinks += 1
        else:
            row.tail += 1
    layer.slots += 1


def addresses(layer: PackedLayer) -> tuple[int, ...]:
    """Where a captured step finds the layer's tensors, and sizes that it was cut by."""
    held = (layer.exact.keys, layer.exact.values, layer.exact.positions, layer.block_table)
    pages = [getattr(part, field.name) for part in layer.pool.whole() for field in fields(part)]
    irregular = layer.pool.irregular_positions.data_ptr() if layer.pool.irregular else 0
    return (*(tensor.data_ptr() for tensor in (*held, *pages)), *layer.block_table.shape, irregular)
