"""A CUDA graph on the CPU: what a function does to tensors, recorded once and done again.

As in a graph, nothing of the Python runs again: each operation of torch and each launch of a kernel
is repeated with the arguments that it had, on the storages that it had. A number that the function
read on the host, or a branch that it took, stays what it was when it was recorded. What a graph
cannot hold at all is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvq_runtime.modes import lasting_tensors
from no_waiting import nothing_waits
from opaque_launches import opaque_launches

WARM_UPS = 2


class RecordedGraph:
    """What a function did, and what it returned; a ``kvq_runtime.cuda_graph.Recording``.

    Fields:
        calls: what is done again, in order.
        launches: how many of them are kernels.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self.launches = 0
        self.result: Any = None

    def replay(self) -> None:
        with lasting_tensors():
            for call in self.calls:
                call()

    def note(self, call: Callable[[], Any], out: Any) -> None:
        """A call is done again, and what it returns put where ``out`` lies."""
        targets = _tensors(out)

        def again() -> None:
            for target, tensor in zip(targets, _tensors(call()), strict=True):
                target.copy_(tensor)

        self.calls.append(again)

    def note_launch(self, call: Callable[[], Any], out: Any) -> None:
        """The same of a kernel."""
        self.launches += 1
        self.note(call, out)


def record(
    function: Callable[[], Any], prepare: Callable[[], None], device: torch.device
) -> RecordedGraph:
    """As ``capture_cuda_graph``, which has the function run only to warm up."""
    assert device.type == "cpu"
    for _ in range(WARM_UPS):
        prepare()
        function()
    # Recording runs it once more, as capturing does not.
    prepare()
    graph = RecordedGraph()
    with nothing_waits(uploads=False), opaque_launches(graph.note_launch), _Recorder(graph):
        graph.result = function()
    return graph


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        out = function(*args, **kwargs)
        if function._schema.is_mutable:
            self.graph.calls.append(lambda: function(*args, **kwargs))
        # Views see what their storage holds; they are not made again.
        elif not all(_storage(tensor) in given for tensor in _tensors(out)):
            self.graph.note(lambda: function(*args, **kwargs), out)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
