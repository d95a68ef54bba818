"""A function that is captured in a CUDA graph once, and replayed without its Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvq_formats.errors import KVQError
from kvq_runtime.model_errors import first_line

WARM_UPS = 2
"""Calls before the capture: the first compiles and loads, the second finds all of it there."""


class CaptureError(KVQError):
    """A step does something that cannot be captured."""


class Recording(Protocol):
    """What was captured.

    Fields:
        result: what the function returned; tensors in it are written anew by each replay.
    """

    @property
    def result(self) -> Any: ...

    def replay(self) -> None:
        """Do again all that the function did on the device, at the same addresses."""
        ...


Capture = Callable[[Callable[[], Any], Callable[[], None], torch.device], Recording]
"""``(function, prepare, device)``; ``prepare`` is called before every call of the function that
runs, and is not captured."""


@dataclass(frozen=True)
class CudaGraph:
    """A ``Recording`` on a GPU."""

    graph: torch.cuda.CUDAGraph
    result: Any

    def replay(self) -> None:
        """Queue the whole graph; returns at once."""
        self.graph.replay()


def capture_cuda_graph(
    function: Callable[[], Any], prepare: Callable[[], None], device: torch.device
) -> CudaGraph:
    """Warm up on a stream beside the current one, then capture.

    Raises CaptureError where the function waits for the device, or does anything else that a graph
    cannot hold.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                prepare()
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on with what they do: only this one must not wait.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            raise CaptureError(
                f"the model's decode step cannot be captured in a CUDA graph: {first_line(error)}",
                hint="--no-cuda-graph (in Python: decode without kvq.CapturedDecode)",
            ) from error
    return CudaGraph(graph, result)
