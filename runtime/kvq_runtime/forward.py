"""What one forward pass says of its tokens: which are attended, and at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime.implementation import ImplementationName
from kvq_runtime.position_runs import runs_of
from kvq_runtime.rotary_channels import UNROTATED, RotaryChannels
from kvq_runtime.rows import Row

if TYPE_CHECKING:
    from kvq_runtime.rotary_layout import LayerRotary

Rule = Literal["runtime", "exact-prefill"]


@dataclass
class Forward:
    """The running forward of an attached model.

    Fields:
        attended: for each row, which of the T tokens are attended, i64; None for all.
        runs: the same as spans ``(start, stop)``.
        positions: i32 ``[B, T]``.
        impl: what packs pages and attends over them.
        host_positions: the same, ``[B or 1, T]`` on the CPU, where they were read already; None
            reads them when somebody asks.
        active: whether the attachment that it belongs to is still open.
    """

    attended: Sequence[Tensor | None]
    runs: Sequence[Sequence[tuple[int, int]]]
    positions: Tensor
    impl: ImplementationName = "reference"
    host_positions: Tensor | None = field(default=None, repr=False)
    active: bool = True
    _expected: Tensor | None = field(default=None, repr=False)
    _runs: list[list[tuple[int, int]]] = field(default_factory=list, repr=False)
    _cos_sin: dict[tuple[LayerRotary, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False
    )
    _elsewhere: dict[torch.device, Forward] = field(default_factory=dict, repr=False)
    _lengths: dict[tuple[torch.device, tuple[tuple[int, ...], ...]], Tensor] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def consecutive(cls, first: int, B: int, T: int, *, device: torch.device) -> Self:
        """All T tokens of B rows attended, at positions ``first``, ``first + 1``, ..."""
        on_host = torch.arange(first, first + T, dtype=torch.int32)
        positions = on_host.to(device).expand(B, T)
        runs = [[(0, T)] if T else []] * B
        return cls([None] * B, runs, positions, host_positions=on_host[None])

    def on(self, device: torch.device) -> Forward:
        """The same with its tensors on ``device``, for layers that lie elsewhere."""
        if self.positions.device == device:
            return self
        if device not in self._elsewhere:
            attended = [None if row is None else row.to(device) for row in self.attended]
            self._elsewhere[device] = Forward(
                attended, self.runs, self.positions.to(device), self.impl, self.host_positions
            )
        return self._elsewhere[device]

    def position_runs(self, place: int) -> list[tuple[int, int]]:
        """``runs_of`` the positions of a row's attended tokens."""
        if not self._runs:
            if self.host_positions is None:
                self.host_positions = self.positions.cpu()
            B, T = len(self.attended), self.positions.shape[-1]
            for positions, runs in zip(self.host_positions.expand(B, T), self.runs, strict=True):
                fed = [positions[start:stop] for start, stop in runs]
                self._runs.append(runs_of(torch.cat(fed)) if fed else [])
        return self._runs[place]

    def cos_sin(self, rotary: LayerRotary, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, f32 ``[B, T, R / 2]``.

        Those of one token are made once for all layers: a dozen small launches each; those of
        a prompt by each layer, for they would take memory all the time.
        """
        found = self._cos_sin.get((rotary, device))
        if found is None:
            found = rotary.angles().cos_sin(self.positions.to(device))
            if self.positions.shape[-1] == 1:
                self._cos_sin[rotary, device] = found
        return found

    def lengths(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        """Pages, sinks and tail of each row, i32 ``[B, 3]``; uploaded once, as layers are alike."""
        counts = tuple((len(row.pages), row.sinks, row.tail) for row in rows)
        if (device, counts) not in self._lengths:
            lengths = torch.tensor(counts, dtype=torch.int32).reshape(-1, 3)
            self._lengths[device, counts] = lengths.to(device, non_blocking=True)
        return self._lengths[device, counts]

    def expect_key(self, key: Tensor) -> Tensor:
        """Note the key, or the part of it, that a layer's rotation returned; it is cached next."""
        self._expected = key
        return key

    def check_key(self, key: Tensor, channels: RotaryChannels) -> None:
        """Raise UnsupportedModelError if a layer caches another key than the expected one.

        A part that the model joins with the rest of its key is another tensor by then; that it is
        the same part was seen when the model was calibrated.
        """
        expected, self._expected = self._expected, None
        start, stop = channels
        if expected is None and channels != UNROTATED:
            raise UnsupportedModelError(
                "a layer caches its keys without having rotated them, or before it does; expected "
                f"channels {start} to {stop - 1} to be rotated first.",
                hint="if its sidecar is from another version of the model's code: kvq calibrate "
                "MODEL --overwrite",
            )
        if expected is not None and expected.shape[-1] != stop - start:
            raise UnsupportedModelError(
                f"a layer rotates {expected.shape[-1]} channels of its keys; its sidecar says "
                f"{stop - start}.",
                hint="calibrate again: kvq calibrate MODEL --overwrite",
            )
        if expected is not key and stop - start == key.shape[-1]:
            raise UnsupportedModelError(
                "this model changes its keys between RoPE and the cache; kvq stores keys before "
                "RoPE and cannot follow."
            )


def spans(attended: Tensor) -> list[tuple[int, int]]:
    """Spans ``(start, stop)`` of True in bool ``[T]``; on the CPU nothing is waited for."""
    edges = torch.nn.functional.pad(attended.to("cpu", torch.int8), (1, 1)).diff().nonzero()[:, 0]
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def check_positions(positions: Tensor, attended: Tensor | None) -> None:
    """Refuse positions ``[B, T]`` that no cache of one text a row can have.

    Raises KVQError for positions below 0, beyond int32, or that go back within a row.
    """
    if positions.numel() == 0:
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high > torch.iinfo(torch.int32).max:
        raise KVQError(
            f"position_ids reach from {low} to {high}, expected 0 to 2**31 - 1.",
            hint="leave position_ids out",
        )
    back = positions[:, 1:] < positions[:, :-1]
    if attended is not None:
        # Positions may be one row for all.
        back = back & attended[:, 1:] & attended[:, :-1]
    if back.any():
        raise KVQError(
            "position_ids go back within a row: several texts in one row (packed sequences) are "
            "not supported.",
            hint="give each text a row of its own, padded with an attention_mask",
        )
