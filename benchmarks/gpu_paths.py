"""Decode steps to time: on the path that the launch table gives, or another; what they launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpu_cases import PackedLayerTables, cache_bytes, copied, decoding
from gpu_timing import copies_of
from torch import Tensor

from kvq_kernels import decode as decode_module
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.launch_table import DecodeLaunch, Path, decode_launch
from kvq_kernels.packed_rows import PackedRows
from kvq_kernels.workspace import Workspace


def cold_copies(rows: PackedRows) -> list[PackedRows]:
    """As many as make a lap cold; the first is ``rows`` itself."""
    count = copies_of(cache_bytes(rows), device=rows.lengths.device)
    return [rows, *(copied(rows) for _ in range(count - 1))]


def kvq_lap(
    layer: PackedLayerTables, query: Tensor, copies: Sequence[PackedRows]
) -> list[Callable[[], Tensor]]:
    """One step for each copy."""
    # A workspace of its own: one that grew later would move what a graph was captured with.
    how = {
        "options": AttentionOptions(scaling=query.shape[-1] ** -0.5),
        "workspace": Workspace(),
    }
    return [decoding(layer, query, rows, **how) for rows in copies]


@contextmanager
def portable() -> Iterator[None]:
    """Let decode steps take the portable path, as a device would that no line names."""
    before = decode_module.decode_launch

    def unnamed(architecture: str, **layer: Any) -> DecodeLaunch:
        found = before("", **layer)
        assert found.path == "portable"
        return found

    with _put("decode_launch", unnamed):
        yield


def portably(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same decode step on the portable path."""

    def run() -> Tensor:
        with portable():
            return call()

    return run


def path_of(call: Callable[[], Tensor]) -> tuple[Path, Tensor]:
    """Run a decode step once; the path that it took, and its output."""
    taken: list[Path] = []

    def seen(architecture: str, **layer: Any) -> DecodeLaunch:
        found = decode_launch(architecture, **layer)
        taken.append(found.path)
        return found

    with _put("decode_launch", seen):
        output = call()
    (path,) = taken
    return path, output


@dataclass(frozen=True)
class Launched:
    """One launch of ``decode_pages``.

    Fields:
        grid: splits, H, B.
        arguments: by name, ``num_warps`` among them. Tensors are kept alive by it.
    """

    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def again(self, kernel: Any, **more: Any) -> Callable[[], object]:
        """A launch of another kernel with what it names of the arguments, and ``more``."""
        known = {**self.arguments, **more}
        given = {name: known[name] for name in kernel.arg_names}
        return lambda: kernel[self.grid](**given, num_warps=self.arguments["num_warps"])


def launch_of(call: Callable[[], Tensor]) -> Launched | None:
    """Run a decode step once; its launch of ``decode_pages``, None on the portable path."""
    score_outliers, kernel, sum_outliers = decode_module.fast_kernels()
    found: list[Launched] = []

    class Recorder:
        arg_names = kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(**arguments: Any) -> None:
                found.append(Launched(grid, arguments))
                kernel[grid](**arguments)

            return launch

    with _put("fast_kernels", lambda: (score_outliers, Recorder(), sum_outliers)):
        call()
    return found[0] if found else None


@contextmanager
def _put(name: str, stand_in: object) -> Iterator[None]:
    before = getattr(decode_module, name)
    setattr(decode_module, name, stand_in)
    try:
        yield
    finally:
        setattr(decode_module, name, before)
