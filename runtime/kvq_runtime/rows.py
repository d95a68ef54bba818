"""What a cache knows of one row of its batch: which slots were attended, and where tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.position_runs import PositionRuns


@dataclass
class Row:
    """The tokens of one row, in order: sinks, pages, tail. Padding takes slots but is not stored.

    Fields:
        attended: slots ``[start, stop)`` whose tokens are attended, in order, not touching.
        sinks: tokens held as sinks.
        pages: ids of the pages.
        lengths: valid tokens of each page; fewer than 256 where the row was cropped into it.
        ends: index in the row of each page's last valid token.
        tail: exact tokens after the last page.
        positions: of all tokens.
    """

    attended: list[tuple[int, int]] = field(default_factory=list)
    sinks: int = 0
    pages: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tail: int = 0
    positions: PositionRuns = field(default_factory=PositionRuns)

    @property
    def tail_start(self) -> int:
        """Index of the first token after the last page."""
        return self.ends[-1] + 1 if self.ends else self.sinks

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.tail_start + self.tail

    def copy(self) -> Row:
        """A row of its own that names the same pages."""
        return Row(
            attended=list(self.attended),
            sinks=self.sinks,
            pages=list(self.pages),
            lengths=list(self.lengths),
            ends=list(self.ends),
            tail=self.tail,
            positions=self.positions.copy(),
        )

    def attend(self, start: int, stop: int) -> None:
        """Note that slots ``start`` to ``stop - 1`` are attended."""
        if self.attended and self.attended[-1][1] == start:
            self.attended[-1] = (self.attended[-1][0], stop)
        else:
            self.attended.append((start, stop))

    def add_pages(self, pages: Sequence[int]) -> None:
        """Append complete pages."""
        for page in pages:
            end = self.tail_start + PAGE_TOKENS - 1
            self.pages.append(page)
            self.lengths.append(PAGE_TOKENS)
            self.ends.append(end)

    def crop(self, slots: int) -> list[int]:
        """Keep the first ``slots`` slots; return the pages that the row no longer needs.

        A page that is cut keeps its record and gets a smaller length.
        """
        kept = [(start, min(stop, slots)) for start, stop in self.attended if start < slots]
        self.attended = kept
        tokens = sum(stop - start for start, stop in kept)
        self.tail = max(0, min(self.tail, tokens - self.tail_start))
        dropped = []
        while self.pages and self.ends[-1] - self.lengths[-1] + 1 >= tokens:
            dropped.append(self.pages.pop())
            self.lengths.pop()
            self.ends.pop()
        if self.pages and self.ends[-1] >= tokens:
            self.lengths[-1] -= self.ends[-1] - (tokens - 1)
            self.ends[-1] = tokens - 1
        self.sinks = min(self.sinks, tokens)
        self.positions.crop(tokens)
        return dropped


def attended_mask(rows: Sequence[Row], slots: int) -> Tensor:
    """Bool ``[B, slots]`` on the CPU: which slots of each row are attended."""
    mask = torch.zeros(len(rows), slots, dtype=torch.bool)
    for place, row in enumerate(rows):
        for start, stop in row.attended:
            mask[place, start:stop] = True
    return mask
