"""Positions of a row's tokens as the host knows them: runs of neighbours.

Positions lie on the device, beside the tokens. Whether those of a page are consecutive decides how
it is stored, and where the next token goes decides what a step is fed: asking the device would mean
to wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


def runs_of(positions: Tensor) -> list[tuple[int, int]]:
    """Place and position of the first token of each run, of positions ``[T]`` on the CPU."""
    if len(positions) == 0:
        return []
    starts = [0, *((positions.diff() != 1).nonzero()[:, 0] + 1).tolist()]
    return list(zip(starts, positions[starts].tolist(), strict=True))


@dataclass
class PositionRuns:
    """Positions of the tokens of one row, which are counted from 0.

    Fields:
        runs: index and position of the first token of each run, in order.
    """

    runs: list[tuple[int, int]] = field(default_factory=list)

    def copy(self) -> PositionRuns:
        """One of its own."""
        return PositionRuns(list(self.runs))

    def extend(self, tokens: int, runs: Iterable[tuple[int, int]]) -> None:
        """Note what ``runs_of`` says of tokens that come after the first ``tokens`` ones."""
        for place, position in runs:
            index = tokens + place
            if not self.runs or self.at(index) != position:
                self.runs.append((index, position))

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens."""
        while self.runs and self.runs[-1][0] >= tokens:
            self.runs.pop()

    def at(self, index: int) -> int:
        """Position of a token; behind the last one, the one that would go on its run."""
        start, position = next(run for run in reversed(self.runs) if run[0] <= index)
        return position + index - start

    def next(self, tokens: int) -> int:
        """Position that goes on after ``tokens`` tokens; 0 where there is none."""
        return self.at(tokens) if self.runs else 0

    def are_consecutive(self, first: int, count: int) -> bool:
        """Whether the positions of ``count`` tokens from ``first`` on are neighbours."""
        for start, _ in reversed(self.runs):
            if start <= first:
                return True
            if start < first + count:
                return False
        return True
