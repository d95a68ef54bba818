from __future__ import annotations

import torch

from kvq_runtime.decode_step import DecodeStep
from kvq_runtime.position_runs import PositionRuns
from kvq_runtime.rows import Row
from no_waiting import nothing_waits

CPU = torch.device("cpu")


def make_rows() -> list[Row]:
    long = Row(sinks=2, tail=5, positions=PositionRuns([(0, 3)]))
    long.tail = 0
    long.add_pages([7])
    long.tail = 5
    return [long, Row(sinks=1, positions=PositionRuns([(0, 0)])), Row()]


def test_the_device_follows_the_host() -> None:
    step, rows = DecodeStep(3, sink_tokens=2, device=CPU), make_rows()
    step.follow(rows)
    assert step.lengths.tolist() == [[1, 2, 5], [0, 1, 0], [0, 0, 0]]
    assert step.position_ids.tolist() == [[3 + 263], [1], [0]]
    # What it knows the device to hold it does not write again.
    step.lengths.fill_(-1)
    rows[1].sinks, rows[1].tail = 2, 4
    step.follow(rows)
    assert step.lengths.tolist() == [[-1, -1, -1], [-1, 2, 4], [-1, -1, -1]]
    step.forget()
    step.follow(rows)
    assert step.lengths.tolist() == [[1, 2, 5], [0, 2, 4], [0, 0, 0]]


def test_a_step_counts_on_the_device() -> None:
    """Sinks fill up first; nothing is read and nothing uploaded."""
    step = DecodeStep(3, sink_tokens=2, device=CPU)
    step.follow(make_rows())
    places = []
    with nothing_waits(uploads=False):
        for _ in range(3):
            forward = step.begin()
            step.end()
            places.append(forward.places)
    assert [place.tolist() for place in places] == [[7, 1, 0], [8, 2, 1], [9, 3, 2]]
    assert step.lengths.tolist() == [[1, 2, 8], [0, 2, 2], [0, 2, 1]]
    assert forward.positions.tolist() == [[3 + 265], [3], [2]]
    assert step.position_ids.tolist() == [[3 + 266], [4], [3]]
    assert forward.lengths([], CPU) is step.lengths
    assert (forward.places.dtype, forward.positions.dtype) == (torch.int64, torch.int32)
