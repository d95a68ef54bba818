"""The table of ``docs/accuracy.md`` that says what each choice is worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from accuracy_choices import DEFAULT, PATHS
from accuracy_models import TITLES
from accuracy_points import Row, read_rows


def choices_table(results: Path) -> Iterator[str]:
    """A line for each change and width: bits, and KL by model, over the default's where it has one.

    KL is that of both paths, prefill before decode. A ratio within two paired standard errors of 1
    is in brackets.
    """
    rows = {
        name: {
            (row["change"], row["bits"], row["path"]): row
            for row in read_rows(results / f"accuracy-choices-{name}.csv")
        }
        for name in TITLES
    }
    yield f"| change | width | {' | '.join(f'bits | `{name}`' for name in TITLES)} |"
    yield f"|---|---|{'---|---|' * len(TITLES)}"
    for change, width in dict.fromkeys(key[:2] for key in next(iter(rows.values()))):
        cells = []
        for found in rows.values():
            pairs = [(found[change, width, p], found.get((DEFAULT, width, p))) for p in PATHS]
            cells += [_bits(*pairs[0]), " / ".join(_kl(*pair) for pair in pairs)]
        yield f"| {change} | {width} | {' | '.join(cells)} |"


def _bits(row: Row, default: Row | None) -> str:
    bits = float(row["effective_bits"])
    if default is None or row is default:
        return f"{bits:.3f}"
    gap = bits - float(default["effective_bits"])
    return f"{gap:+.3f}" if gap else "same"


def _kl(row: Row, default: Row | None) -> str:
    kl = float(row["kl"])
    if default is None or row is default:
        return f"{kl:.2g}"
    ratio = f"{kl / float(default['kl']):.2f}"
    certain = abs(float(row["difference"])) > 2 * float(row["difference_stderr"])
    return ratio if certain else f"({ratio})"
