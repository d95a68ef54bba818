"""The file of ``paper_table.py``: rows that are measured once, and the table they make."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_protocol import SOURCE
from results_csv import cell, write_csv

from kvq_formats.errors import ConfigError

Record = Mapping[str, object]

COLUMNS = {
    "cache": "name",
    "bits eff": "effective_bits",
    "ppl": "perplexity",
    "Δ": "perplexity_increase",
    "KL": "kl",
    "agree": "agreement",
    "paper": "published",
    "ours - paper": "difference",
    "paper's Δ": "published_increase",
}
DIGITS = {"bits eff": 2, "KL": 5, "agree": 4}


class ResultFile:
    """Rows on disk, found again by the columns that say what was measured."""

    def __init__(self, path: Path) -> None:
        """Read what is there; raises ConfigError for a file that is no result of this script."""
        self.path = path
        self.rows: list[Record] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
            if not self.rows or not {"name", "perplexity", "stride"} <= self.rows[0].keys():
                raise ConfigError(
                    f"{path} has no rows of a table like this one.", hint="-o names another file"
                )

    def find(self, identity: Record) -> Record:
        """The row that was measured so."""
        return next(row for row in self.rows if _agrees(row, identity))

    def has(self, identity: Record) -> bool:
        """Whether it was measured."""
        return any(_agrees(row, identity) for row in self.rows)

    def forget(self, identities: Sequence[Record]) -> None:
        """Leave rows out that are measured again; the file keeps them until the next is added."""
        self.rows = [row for row in self.rows if not any(_agrees(row, it) for it in identities)]

    def check_weights(self, settings: Record, weights: str) -> None:
        """Raise ConfigError where rows of this model come from other weights."""
        for row in self.rows:
            if _agrees(row, settings) and row["weights"] != weights:
                raise ConfigError(
                    f"{self.path} has rows of this model with weights {row['weights']}; those that "
                    f"are there now are {weights}.",
                    hint="--overwrite, or -o with another file",
                )

    def add(self, row: Record) -> None:
        """Write the file anew with one more row; raises ConfigError if it has other columns."""
        if self.rows and list(self.rows[0]) != list(row):
            differing = sorted(self.rows[0].keys() ^ row.keys())
            raise ConfigError(
                f"{self.path} has other columns than are written now: {', '.join(differing)}.",
                hint="-o names another file",
            )
        self.rows.append({name: str(cell(value)) for name, value in row.items()})
        write_csv(self.path, self.rows)


def _agrees(row: Record, identity: Record) -> bool:
    return all(row.get(name) == str(cell(value)) for name, value in identity.items())


def print_table(rows: Sequence[Record]) -> None:
    """Rows in plain columns; what a row does not have stays empty."""
    first = rows[0]
    extent = f"{first['windows']} of {first['windows_available']} windows of {first['seq_len']}"
    print(f"{first['model']} on {first['dataset']}: {extent} tokens, {first['tokens']} scored")
    if any(row["published"] for row in rows):
        print(f"paper: {SOURCE}")
    for cells in (list(COLUMNS), *map(_cells, rows)):
        print(f"{cells[0]:<18}" + "".join(f"{it:>13}" for it in cells[1:]))


def _cells(row: Record) -> list[str]:
    cells = []
    for header, column in COLUMNS.items():
        value = str(row[column])
        if column != "name" and value:
            value = f"{float(value):.{DIGITS.get(header, 3)}f}"
        cells.append(value)
    return cells
