"""Whether ``kvq generate`` decodes from a CUDA graph, and what it says of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq_cli.output import Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvq_runtime.cache import PackedCache
    from kvq_runtime.captured_decode import CapturedDecode


@dataclass
class DecodeGraph:
    """How tokens were decoded.

    Fields:
        captured: what replays; None where steps run from Python.
        reason: why they do; None where nobody wanted anything else.
    """

    captured: CapturedDecode | None = None
    reason: str | None = None

    @property
    def refused(self) -> str | None:
        """Why steps run from Python, the first of them having shown it."""
        if self.captured is not None and self.captured.refused is not None:
            return self.captured.refused.message
        return self.reason

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        replays = 0 if self.captured is None else self.captured.replays
        return {"replays": replays, "reason": self.refused}


@contextmanager
def decode_graph(
    output: Output,
    model: PreTrainedModel,
    cache: PackedCache,
    *,
    wanted: bool | None,
    silent: bool = False,
) -> Iterator[DecodeGraph]:
    """Decode from a CUDA graph while the context is open, if the model and its device allow it.

    Args:
        output, model, cache: of the command.
        wanted: False never does; True does or raises KVQError; None says why not, on a GPU.
        silent: say nothing, because attention that cannot be captured was asked for.
    """
    from kvq_formats.errors import KVQError
    from kvq_runtime.captured_decode import CapturedDecode

    if wanted is False:
        yield DecodeGraph()
        return
    try:
        captured = CapturedDecode(model, cache, eager_if_refused=wanted is None)
    except KVQError as refused:
        if wanted:
            raise
        if model.device.type == "cuda" and not silent:
            output.note(f"each token is decoded from Python: {refused.message}")
        yield DecodeGraph(reason=refused.message)
        return
    used = DecodeGraph(captured)
    with captured:
        yield used
    if used.refused is not None:
        output.note(f"each token was decoded from Python: {used.refused}")
