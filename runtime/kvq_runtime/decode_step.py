"""What a captured decode step reads on the device: the token, its position, and all counts.

A step is captured once and replayed for every token, so that nothing in it may depend on a number
that the host knew when it was captured. Where a token goes and how much a row holds are read from
tensors here, at addresses that stay, and the step itself moves them on. The host counts along, and
writes them anew only where it did something else in between: a page that was packed, a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvq_kernels.workspace import Workspace
from kvq_runtime.forward import Forward
from kvq_runtime.modes import lasting_tensors
from kvq_runtime.rows import Row


class StepForward(Forward):
    """The forward of a step: one attended token a row, after all that the row holds."""

    def __init__(
        self, positions: Tensor, places: Tensor, lengths: Tensor, workspace: Workspace
    ) -> None:
        """What is read on the device.

        Args:
            positions: i32 ``[B, 1]``.
            places: i64 ``[B]``, where in its row's exact tokens the new one goes.
            lengths: i32 ``[B, 3]``, pages, sinks and tail of each row, with the new token.
            workspace: of the step alone: a graph knows its buffers by their address.
        """
        B = len(places)
        super().__init__([None] * B, [[(0, 1)]] * B, positions, impl="triton")
        self.places = places
        self.workspace = workspace
        self._step_lengths = lengths

    def lengths(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        """Those of the device, which the host need not know."""
        return self._step_lengths


class DecodeStep:
    """Inputs of a captured step, and counts that it moves on itself.

    Fields:
        token_ids: i64 ``[B, 1]``.
        position_ids: i64 ``[B, 1]``, of these tokens.
        lengths: i32 ``[B, 3]``: pages, sinks and tail of each row.
        workspace: buffers of attention.
    """

    def __init__(self, batch_size: int, *, sink_tokens: int, device: torch.device) -> None:
        self.sink_tokens = sink_tokens
        self.workspace = Workspace()
        with lasting_tensors():
            self.token_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
            self.position_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
            self.lengths = torch.zeros(batch_size, 3, dtype=torch.int32, device=device)
        self.forget()

    def forget(self) -> None:
        """What the device holds is not known: a step that counts for nothing has moved it on."""
        self._held: list[tuple[int | None, ...]] = [(None,) * 4] * len(self.lengths)

    def follow(self, rows: Sequence[Row]) -> None:
        """Write to the device what it does not hold yet of the rows' counts."""
        wanted = _counts(rows)
        for place, (held, now) in enumerate(zip(self._held, wanted, strict=True)):
            for column, (old, new) in enumerate(zip(held, now, strict=True)):
                if old != new:
                    # A number and no tensor: nothing is uploaded, and so nothing waited for.
                    target = self.lengths[place, column] if column < 3 else self.position_ids[place]
                    target.fill_(new)
        self._held = list(wanted)

    def followed(self, rows: Sequence[Row]) -> None:
        """The device has moved its counts on by itself, to those of the rows."""
        self._held = list(_counts(rows))

    def begin(self) -> StepForward:
        """Count the new token of each row, on the device: what the step's layers go by."""
        positions = self.position_ids.to(torch.int32)
        places = self.lengths[:, 1] + self.lengths[:, 2]
        sinks = (places + 1).clamp(max=self.sink_tokens)
        self.lengths[:, 1] = sinks
        self.lengths[:, 2] = places + 1 - sinks
        return StepForward(positions, places.to(torch.int64), self.lengths, self.workspace)

    def end(self) -> None:
        """Go on to the next position, on the device."""
        self.position_ids += 1


def _counts(rows: Sequence[Row]) -> Sequence[tuple[int, int, int, int]]:
    """Pages, sinks, tail, and the position that comes next."""
    return [(len(row.pages), row.sinks, row.tail, row.positions.next(row.tokens)) for row in rows]
