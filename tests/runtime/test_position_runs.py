from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_runtime.position_runs import PositionRuns, runs_of


def test_runs_of_neighbours() -> None:
    assert runs_of(torch.tensor([], dtype=torch.int64)) == []
    assert runs_of(torch.tensor([4, 5, 6, 9, 9, 10])) == [(0, 4), (3, 9), (4, 9)]


@given(
    st.lists(
        st.one_of(
            st.lists(st.integers(0, 6), max_size=12),
            st.integers(0, 40),
        ),
        max_size=8,
    ),
    st.integers(1, 5),
)
def test_whatever_is_fed_and_cropped_positions_are_known(
    steps: list[list[int] | int], count: int
) -> None:
    """Against a plain list; a step is positions to append, or how many tokens to keep."""
    runs, plain = PositionRuns(), []
    for step in steps:
        if isinstance(step, int):
            plain = plain[:step]
            runs.crop(len(plain))
        else:
            runs.extend(len(plain), runs_of(torch.tensor(step, dtype=torch.int64)))
            plain += step
        assert [runs.at(index) for index in range(len(plain))] == plain
        assert runs.next(len(plain)) == (plain[-1] + 1 if plain else 0)
        for first in range(len(plain) - count + 1):
            some = plain[first : first + count]
            neighbours = some == list(range(some[0], some[0] + count))
            assert runs.are_consecutive(first, count) == neighbours
    # Text that goes on takes no room, however long it is.
    assert len(runs.runs) <= len(plain)


def test_one_run_stays_one() -> None:
    runs = PositionRuns()
    for tokens in range(1000):
        runs.extend(tokens, [(0, 7 + tokens)])
    assert runs.runs == [(0, 7)]
    copied = runs.copy()
    copied.extend(1000, [(0, 0)])
    assert runs.next(1000) == 1007
