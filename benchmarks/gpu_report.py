"""Rows of the GPU benchmark: on disk after every part, and as a table at the end."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from gpu_timing import Timing, brief
from results_csv import write_csv

COLUMNS = (
    *("part", "what", "shape", "batch", "tokens", "key_bits", "value_bits", "outliers"),
    *("metric", "value", "unit", "note"),
)
CUT = "cut: no time left"


class Deadline:
    """A number of seconds from now on, within another deadline if there is one."""

    def __init__(self, seconds: float, outer: Deadline | None = None) -> None:
        self._end = time.monotonic() + seconds
        if outer is not None:
            self._end = min(self._end, outer._end)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def passed(self) -> bool:
        """Whether there is no time left."""
        return self.left <= 0


class Report:
    """All rows so far.

    Fields:
        rows: in the order that they were found.
        invalid: set where checks failed; every row that is added then says so.
        failures: rows that are errors of ours, not of a baseline.
    """

    def __init__(self, path: Path, common: Mapping[str, object]) -> None:
        self.path = path
        self.rows: list[dict[str, object]] = []
        self.invalid = ""
        self.failures = 0
        self._common = dict(common)

    def add(self, part: str, what: str, metric: str, value: object, unit: str = "",
            note: str = "", **where: object) -> None:  # fmt: skip
        """Add a row; ``where`` names further columns."""
        assert set(where) <= set(COLUMNS), where
        note = "; ".join(text for text in (self.invalid, note) if text)
        given = {"part": part, "what": what, "metric": metric, "value": value, "unit": unit}
        row = dict.fromkeys(COLUMNS, "") | where | given | {"note": note}
        self.rows.append(row | self._common)

    def add_timing(
        self, part: str, what: str, timing: Timing, *, note: str = "", **where: object
    ) -> None:
        """Rows of a time in microseconds, or one row that says why there is none."""
        if timing.error or not timing.samples:
            self.add(part, what, "us", "", "us", timing.error or CUT, **where)
            return
        note = "; ".join(
            text for text in (note, f"{len(timing.samples)} samples, {timing.how}") if text
        )
        self.add(part, what, "us", 1e6 * timing.median, "us", note, **where)
        for name, share in (("us_p20", 0.2), ("us_p80", 0.8)):
            self.add(part, what, name, 1e6 * timing.quantile(share), "us", **where)

    @contextmanager
    def guarded(self, part: str, what: str, **where: object) -> Iterator[None]:
        """Turn an error inside into a row, and free the memory of what failed."""
        try:
            yield
        # Nobody is there to start the rest again: an error costs its own rows only.
        except Exception as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self.failures += not out_of_memory
            if not out_of_memory:
                traceback.print_exc()
            self.add(part, what, "failed", "", note=brief(error), **where)
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Write all rows under a temporary name, then rename."""
        if self.rows:
            # A copy: the watch at the end of the time writes from another thread.
            write_csv(self.path, list(self.rows))

    def show(self) -> None:
        """Print rows as a table: a line for what was measured, its metrics side by side."""
        keys = COLUMNS[: COLUMNS.index("metric")]
        lines: dict[tuple[object, ...], list[dict[str, object]]] = {}
        for row in self.rows:
            lines.setdefault(tuple(row[key] for key in keys), []).append(row)
        part = None
        for key, rows in lines.items():
            if key[0] != part:
                part = key[0]
                print(f"\n== {part}")
            print(f"{' '.join(_named(key)):<56} {', '.join(self._cells(rows))}")
        if self.invalid:
            print(f"\n{self.invalid}")
        print(f"\n{self.path}", flush=True)

    def _cells(self, rows: list[dict[str, object]]) -> Iterator[str]:
        found = {row["metric"]: row["value"] for row in rows}
        for row in rows:
            metric, value, note = row["metric"], row["value"], str(row["note"])
            if metric in ("us_p20", "us_p80"):
                continue
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            text = f"{metric} {shown or '-'}"
            if metric == "us" and "us_p20" in found:
                text += f" ({found['us_p20']:.4g} to {found['us_p80']:.4g})"
            elif row["unit"] not in ("", metric):
                text += f" {row['unit']}"
            note = note.removeprefix(self.invalid).removeprefix("; ")
            yield f"{text} [{note}]" if note else text


def _named(key: tuple[object, ...]) -> Iterator[str]:
    _, what, shape, batch, tokens, key_bits, value_bits, outliers = (str(cell) for cell in key)
    yield what
    if shape:
        yield shape
    if tokens:
        yield f"{batch or 1} x {tokens}"
    if key_bits:
        yield f"{key_bits}/{value_bits} bits"
    if outliers:
        yield f"{outliers} outliers"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
