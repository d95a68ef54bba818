"""Encode and decode against a codebook: the oracle that every kernel is tested against.

A code is chosen with the *plain* codebook (midpoint compares) and decoded with the *decode*
codebook, which has Q-Norm folded in and is snapped to a grid of 256 steps, so that a kernel can
build an entry from one byte (``docs/method.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

LEVELS = 255
"""Steps of the grid that decode entries are snapped to: an entry is ``offset + step * level``."""


@dataclass(frozen=True)
class Codebook:
    """One codebook, of the keys or of the values of one layer.

    Fields:
        entries: f32 ``[N]``, strictly increasing, in units of the normalised range [-1, 1];
            ``N = 2**bits``.
        levels: u8 ``[N]``; ``offset + step * levels`` are the decode entries.
        offset, step: in the same units.
        qnorm_scale, qnorm_shift: the Q-Norm that the decode entries already contain (1 and 0
            when it is off); kept to be looked at, never applied again.
    """

    entries: Tensor
    levels: Tensor
    offset: float
    step: float
    qnorm_scale: float = 1.0
    qnorm_shift: float = 0.0

    @classmethod
    def fit_grid(
        cls, entries: Tensor, *, qnorm_scale: float = 1.0, qnorm_shift: float = 0.0
    ) -> Self:
        """Snap ``entries * qnorm_scale + qnorm_shift`` to 256 steps between its own ends.

        Entries are f32 ``[N]``, sorted. An entry moves by at most half a step, 1/510 of the
        codebook's width.
        """
        decoded = entries.double() * qnorm_scale + qnorm_shift
        # Offset and step are stored as f32: snap against what a reader will multiply with.
        offset = float(decoded[0].float())
        step = float(((decoded[-1] - decoded[0]) / LEVELS).float())
        levels = ((decoded - offset) / step).round().clamp(0, LEVELS).to(torch.uint8)
        return cls(
            entries=entries.float(),
            levels=levels,
            offset=offset,
            step=step,
            qnorm_scale=float(torch.tensor(qnorm_scale, dtype=torch.float32)),
            qnorm_shift=float(torch.tensor(qnorm_shift, dtype=torch.float32)),
        )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.entries) - 1).bit_length()

    @property
    def midpoints(self) -> Tensor:
        """Decision boundaries, f32 ``[N - 1]``: ``code = sum(z > midpoints)``."""
        return (self.entries[1:] + self.entries[:-1]) / 2

    @property
    def decode_entries(self) -> Tensor:
        """What a code decodes to, f32 ``[N]``, before half-range and centre."""
        return self.offset + self.step * self.levels.float()

    def encode(self, z: Tensor) -> Tensor:
        """Codes u8 of normalised numbers, f32, any shape; beyond [-1, 1] the end entries clamp."""
        codes = torch.zeros_like(z, dtype=torch.uint8)
        for midpoint in self.midpoints.tolist():
            codes += z > midpoint
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Normalised numbers f32 of codes u8, any shape."""
        return self.decode_entries.to(codes.device)[codes.int()]
