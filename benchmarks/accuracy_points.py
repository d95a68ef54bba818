"""Points of the plot from the rows of ``accuracy.py``: a method's settings, seeds joined."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accuracy_bars import Point
from accuracy_caches import LINES, PAPER_BITS, RIVALS, ours

from kvq_evaluation.statistics import WindowMetrics, over_seeds

Row = Mapping[str, str]
"""A line of the CSV."""


def read_rows(path: Path) -> list[Row]:
    """Lines of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(rows: Sequence[Row], path: str) -> dict[str, list[Point]]:
    """Ours and the rivals', by method, each setting once: measured on ``prefill`` or ``decode``."""
    mine = {line: [one.name for one in ours() if one.line == line] for line in LINES}
    settings = {**mine, **{method: list(names) for method, names in RIVALS.items()}}
    found = {
        method: [point for name in names if (point := _point(rows, name, path)) is not None]
        for method, names in settings.items()
    }
    found[PAPER_BITS] = [
        point
        for name in RIVALS["KVQuant"]
        if (point := _point(rows, name, path, bits="paper_bits")) is not None
    ]
    return {method: points for method, points in found.items() if points}


def seeds_of(rows: Sequence[Row], name: str, path: str) -> list[Row]:
    """The rows of one cache, a seed each."""
    return [row for row in rows if (row["name"], row["path"]) == (name, path)]


def _point(
    rows: Sequence[Row], name: str, path: str, *, bits: str = "effective_bits"
) -> Point | None:
    seeds = seeds_of(rows, name, path)
    if not seeds:
        return None
    joined = over_seeds([_windows(row) for row in seeds])
    # Widths chosen by expected loss can differ by seed.
    mean_bits = sum(float(row[bits]) for row in seeds) / len(seeds)
    return Point(name, mean_bits, joined.mean, joined.stderr)


def _windows(row: Row) -> WindowMetrics:
    """Divergence of every window; the rest of a window's sums is not asked for."""
    kl = torch.tensor(list(_numbers(row["window_kl"])), dtype=torch.float64)
    tokens = torch.full((len(kl),), int(row["tokens"]) // len(kl), dtype=torch.int64)
    return WindowMetrics(
        name=row["name"], nll=torch.zeros_like(kl), kl=kl, agreement=torch.zeros_like(tokens),
        tokens=tokens,
    )  # fmt: skip


def _numbers(cell: str) -> Iterator[float]:
    return (float(number) for number in cell.split())
