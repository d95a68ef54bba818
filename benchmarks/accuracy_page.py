"""The generated parts of ``docs/accuracy.md``: bars, tables, and the plot beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from accuracy_bars import (
    BARS,
    BELOW_THE_LINE,
    Bar,
    Point,
    Verdict,
    below_the_line,
    judge,
)
from accuracy_caches import (
    AVERAGE,
    GARBAGE,
    LINES,
    PAPER_BITS,
    STEPPED,
    TOKEN_BY_TOKEN,
    UNIFORM,
)
from accuracy_choices_table import choices_table
from accuracy_models import TITLES
from accuracy_plot import write_plot
from accuracy_points import Row, lines, read_rows, seeds_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
PLOT = PAGE.with_suffix(".svg")

PATHS = ("prefill", "decode")
COLUMNS = (
    "method", "setting", "bits", "KL", "median", "p99", "top-1", "Δ ppl", "attention", "decode KL",
)  # fmt: skip


def write_page(results: Path, page: Path = PAGE, plot: Path = PLOT) -> None:
    """Fill what lies between the page's markers from the CSVs in ``results``, and draw the plot."""
    rows = {name: read_rows(results / f"accuracy-{name}.csv") for name in TITLES}
    text = page.read_text(encoding="utf-8")
    for name, part in (
        ("bars", _bars(rows)),
        ("tables", _tables(rows)),
        ("choices", choices_table(results)),
    ):
        text = between(text, name, "\n".join(part))
    write_plot(plot, {TITLES[name]: lines(found, "prefill") for name, found in rows.items()})
    page.write_text(text, encoding="utf-8")


def between(text: str, name: str, part: str) -> str:
    """``text`` with ``part`` between the markers of ``name``; ValueError where they are not."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = text.partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"the page has no markers {begin.strip()} and {end.strip()}")
    return f"{before}{begin}\n{part}\n\n{end}{after}"


def _bars(rows: dict[str, list[Row]]) -> Iterator[str]:
    yield "| bar | model | path | KL of ours / rival's | the rival | settings that meet it |"
    yield "|---|---|---|---|---|---|"
    for bar in BARS:
        for model in TITLES:
            for path in PATHS:
                found = lines(rows[model], path)
                mine = [point for line in (AVERAGE, UNIFORM) for point in found.get(line, ())]
                rivals = {name: p for name, p in found.items() if name not in LINES}
                yield _bar_row(bar, model, path, judge(bar, mine, rivals))
    for model in TITLES:
        for path in PATHS:
            found = lines(rows[model], path)
            yield _line_row(model, path, found[UNIFORM], found[AVERAGE])


def _bar_row(bar: Bar, model: str, path: str, verdicts: Sequence[Verdict]) -> str:
    head = f"| {bar.name}: ≤ {bar.factor:g} times | {model} | {path}"
    if not verdicts:
        return f"{head} | nothing to compare | | |"
    met = [verdict.ours.name for verdict in verdicts if verdict.met]
    ratios = [f"{verdict.ratio:.2f}" for verdict in (verdicts[0], verdicts[-1])]
    span = " to ".join(dict.fromkeys(ratios))
    names = ", ".join(dict.fromkeys(verdict.rival for verdict in verdicts))
    count = f"{len(met)} of {len(verdicts)}"
    return f"{head} | {span} | {names} | {': '.join([count, ', '.join(met)] if met else [count])} |"


def _line_row(model: str, path: str, uniform: Sequence[Point], averages: Sequence[Point]) -> str:
    two, three = uniform[0], uniform[1]
    one = next(point for point in averages if point.name.endswith(" 2.75"))
    below = below_the_line(two, one, three)
    met = "met" if below >= BELOW_THE_LINE else "missed"
    where = f"{abs(below):.0%} {'below' if below >= 0 else 'above'}"
    return (
        f"| `--average-bits 2.75` under the line from 2 to 3 bits: ≥ {BELOW_THE_LINE:.0%} "
        f"| {model} | {path} | {where} | {two.name} and {three.name} | {met} |"
    )


def _tables(rows: dict[str, list[Row]]) -> Iterator[str]:
    for model, title in TITLES.items():
        first = rows[model][0]
        decoded_windows = seeds_of(rows[model], "int2", "decode")[0]["windows"]
        yield f"### {title} (`{model}`)\n"
        yield (
            f"Unquantized perplexity {float(first['perplexity']):.2f}. {first['windows']} windows "
            f"of {first['seq_len']} tokens of {first['dataset']}, {decoded_windows} of them on the "
            "decode path.\n"
        )
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        decoded = {p.name: p for points in lines(rows[model], "decode").values() for p in points}
        for method, points in lines(rows[model], "prefill").items():
            if method == PAPER_BITS:
                continue
            for point in points:
                yield _table_row(rows[model], method, point, decoded.get(point.name))
        yield _garbage_row(rows[model])
        yield f"\n{_stepped(rows[model])}\n"


def _table_row(rows: Sequence[Row], method: str, point: Point, decoded: Point | None) -> str:
    seeds = seeds_of(rows, point.name, "prefill")

    def mean(column: str) -> float:
        return sum(float(row[column]) for row in seeds) / len(seeds)

    name = f"**{method}**" if method in (AVERAGE, UNIFORM) else method
    bits = f"{point.bits:.3f}"
    if seeds[0].get("paper_bits"):
        bits += f" ({mean('paper_bits'):.2f})"
    cells = (
        name, f"`{point.name}`", bits, _with_error(point), f"{mean('kl_median'):.2g}",
        f"{mean('kl_p99'):.2g}", f"{100 * mean('agreement'):.1f} %",
        f"{mean('perplexity_increase'):+.3f}", f"{mean('attention_error'):.3f}",
        "" if decoded is None else _with_error(decoded),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _garbage_row(rows: Sequence[Row]) -> str:
    prefill, decode = (
        " ".join(f"{float(row['kl']):.2f}" for row in seeds_of(rows, GARBAGE, path))
        for path in PATHS
    )
    return f"| check | {GARBAGE} | | {prefill} | | | | | | {decode} |"


def _stepped(rows: Sequence[Row]) -> str:
    """The check that one forward under the runtime rule is what decoding reads."""
    (stepped,) = seeds_of(rows, TOKEN_BY_TOKEN, "decode")
    once = seeds_of(rows, STEPPED, "decode")[0]
    total, tokens = float(once["window_kl"].split()[0]), int(stepped["tokens"])
    return (
        f"First window of `{STEPPED}` on the decode path: KL {float(stepped['kl']):.6f} token by "
        f"token through the packed cache, {total / tokens:.6f} in one forward."
    )


def _with_error(point: Point) -> str:
    if point.stderr is None:
        return f"{point.kl:.5f}"
    return f"{point.kl:.5f} ± {point.stderr:.5f}"


if __name__ == "__main__":
    from accuracy import RESULTS

    write_page(RESULTS)
