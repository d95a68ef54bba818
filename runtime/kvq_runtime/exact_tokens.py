"""Tokens that are held exactly: the sinks of each row, and its tail behind the last page."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvq_runtime.modes import lasting_tensors


class Tokens(NamedTuple):
    """Neighbouring tokens of one row.

    Fields:
        keys: ``[H, T, D]``, before RoPE, in rotary channel order.
        values: ``[H, T, D]``.
        positions: i32 ``[T]``.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def length(self) -> int:
        """T."""
        return self.keys.shape[1]

    def at(self, places: slice | Tensor) -> Tokens:
        """Some of the tokens: a view for a slice."""
        return Tokens(self.keys[:, places], self.values[:, places], self.positions[places])

    def followed_by(self, other: Tokens) -> Tokens:
        """A copy of both."""
        return Tokens(
            torch.cat([self.keys, other.keys], dim=1),
            torch.cat([self.values, other.values], dim=1),
            torch.cat([self.positions, other.positions]),
        )


class ExactBuffers:
    """Room for ``size`` tokens of each row, in the model's dtype: sinks, then the tail."""

    def __init__(
        self,
        batch_size: int,
        size: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, num_kv_heads, size, head_dim)
        with lasting_tensors():
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            self.positions = torch.zeros(batch_size, size, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes

    def read(self, row: int, start: int, stop: int) -> Tokens:
        """A view of the places ``start`` to ``stop - 1`` of a row."""
        return Tokens(
            self.keys[row, :, start:stop],
            self.values[row, :, start:stop],
            self.positions[row, start:stop],
        )

    def write(self, row: int, start: int, tokens: Tokens) -> None:
        """Put tokens at the places from ``start`` on; they may be a view of the same buffers."""
        target = self.read(row, start, start + tokens.length)
        for stored, written in zip(target, tokens, strict=True):
            shared = stored.untyped_storage().data_ptr() == written.untyped_storage().data_ptr()
            stored.copy_(written.clone() if shared else written)

    def put(self, places: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put one token of each row where ``places``, i64 ``[B]``, says on the device.

        Keys and values are ``[B, H, 1, D]``, positions i32 ``[B, 1]``.
        """
        index = places[:, None, None, None].expand_as(keys)
        self.keys.scatter_(2, index, keys.to(self.keys.dtype))
        self.values.scatter_(2, index, values.to(self.values.dtype))
        self.positions.scatter_(1, places[:, None], positions)

    def select(self, order: Tensor) -> None:
        """Row ``i`` becomes what row ``order[i]`` was; as many rows stay where they lie."""
        self.keys = reordered(self.keys, order)
        self.values = reordered(self.values, order)
        self.positions = reordered(self.positions, order)


def reordered(rows: Tensor, order: Tensor) -> Tensor:
    """Line ``i`` becomes what line ``order[i]`` was: in place, unless their number changes.

    What a step was captured with keeps its address.
    """
    with lasting_tensors():
        chosen = rows.index_select(0, order)
        return rows.copy_(chosen) if len(chosen) == len(rows) else chosen
