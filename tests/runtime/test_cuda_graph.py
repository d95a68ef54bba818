"""Capturing on a GPU, with ``KVQ_TEST_DEVICE=cuda``; and what stands in for it on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvq_runtime.cuda_graph import CaptureError, capture_cuda_graph
from no_waiting import WouldWait, nothing_waits
from recorded_graph import record

CPU = torch.device("cpu")
ON_GPU = os.environ.get("KVQ_TEST_DEVICE", "cpu") == "cuda"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: KVQ_TEST_DEVICE=cuda")
def test_a_graph_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    number, count = torch.zeros(4, device=device), torch.zeros((), device=device)
    prepared: list[float] = []

    def function() -> Tensor:
        count.add_(1)
        return number * 2 + count

    def prepare() -> None:
        prepared.append(float(count))
        count.zero_()

    graph = capture_cuda_graph(function, prepare, device)
    # Nothing runs while it is captured.
    assert prepared == [0.0, 1.0]
    assert float(count) == 1.0
    number.fill_(5)
    graph.replay()
    assert graph.result.tolist() == [12.0] * 4
    with pytest.raises(CaptureError, match="cannot be captured in a CUDA graph") as found:
        capture_cuda_graph(lambda: number + float(count), lambda: None, device)
    assert "--no-cuda-graph" in found.value.hint
    # What failed leaves a device that goes on.
    assert float((number + 1).sum()) == 24.0


def test_a_recording_repeats_what_was_done() -> None:
    """In place, by views, and with results of their own; the Python in between is gone."""
    given, total, seen = torch.zeros(3), torch.zeros(3), []

    def function() -> Tensor:
        seen.append(len(seen))
        total[1:].add_(given[1:])
        total.scatter_(0, torch.zeros(1, dtype=torch.int64, device=CPU), 9.0)
        return total.view(3, 1).T + seen[-1]

    graph = record(function, total.zero_, CPU)
    assert graph.result.tolist() == [[11.0, 2.0, 2.0]]
    given.fill_(1)
    graph.replay()
    graph.replay()
    assert total.tolist() == [9.0, 2.0, 2.0]
    # A number of the host stays what it was.
    assert graph.result.tolist() == [[11.0, 4.0, 4.0]]
    assert seen == [0, 1, 2]


NUMBERS = torch.arange(4.0)
WAITING: list[Callable[[], object]] = [
    NUMBERS.tolist,
    NUMBERS.numpy,
    NUMBERS.cpu,
    NUMBERS.nonzero,
    NUMBERS[0].item,
    lambda: bool(NUMBERS[0]),
    lambda: int(NUMBERS[0]),
    lambda: NUMBERS[NUMBERS > 1],
    lambda: torch.equal(NUMBERS, NUMBERS),
    lambda: torch.unique(NUMBERS),
    lambda: range(NUMBERS.long()[1]),
]
UPLOADING: list[Callable[[], object]] = [
    lambda: torch.tensor([1.0]),
    lambda: torch.zeros(3),
    lambda: torch.arange(3),
]


@pytest.mark.parametrize("call", WAITING)
def test_what_would_wait_is_refused(call: Callable[[], object]) -> None:
    call()
    with nothing_waits(), pytest.raises(WouldWait):
        call()


@pytest.mark.parametrize("call", UPLOADING)
def test_what_would_upload_is_refused_in_a_graph(call: Callable[[], object]) -> None:
    with nothing_waits():
        call()
    with nothing_waits(uploads=False), pytest.raises(WouldWait):
        call()
