"""The page of accuracy from rows that are made up: nothing lost, the same file twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from accuracy_caches import AVERAGE, GARBAGE, RIVALS, TOKEN_BY_TOKEN, UNIFORM, ours
from accuracy_choices import CHANGES, DEFAULT
from accuracy_models import TITLES
from accuracy_page import between, write_page
from accuracy_points import lines
from results_csv import write_csv

MARKED = "before\n" + "".join(
    f"<!-- {name} -->\nstale\n<!-- end of {name} -->\nbetween\n"
    for name in ("bars", "tables", "choices")
)


def row(name: str, path: str, bits: float, kl: float, seed: str = "0") -> dict[str, object]:
    """Two windows of ten tokens, with KL a tenth below and above the mean."""
    return {
        "seq_len": 11, "name": name, "seed": seed, "dataset": "text", "path": path, "kl": kl,
        "perplexity": 100.0, "perplexity_increase": 0.5, "kl_median": kl / 2, "kl_p99": 9 * kl,
        "agreement": 0.9, "effective_bits": bits, "windows": 2, "tokens": 20,
        "attention_error": 0.1, "window_kl": f"{9 * kl} {11 * kl}",
        "paper_bits": bits - 0.5 if name.startswith("kvquant") else None,
    }  # fmt: skip


def rows(factor: float) -> list[dict[str, object]]:
    """KL falls tenfold a bit; ours is ``factor`` of a rival's."""
    found = []
    for path in ("prefill", "decode"):
        for one in ours():
            bits = one.average_bits or one.config.key_bits
            found += [
                row(one.name, path, bits, factor * 10.0**-bits, str(seed))
                for seed in range(one.seeds)
            ]
        for settings in RIVALS.values():
            found += [row(name, path, bits, 10.0**-bits) for bits, name in enumerate(settings, 2)]
        found.append(row(GARBAGE, path, 2.0, 5.0, ""))
    found.append({**row(TOKEN_BY_TOKEN, "decode", 2.0, 0.25), "tokens": 10})
    return found


def choices() -> list[dict[str, object]]:
    return [
        {
            "change": change, "bits": bits, "path": path,
            "effective_bits": 2.5 + 0.25 * place, "kl": 0.01,
            "difference": "" if change == DEFAULT else 0.002, "difference_stderr": 0.0015,
        }
        for place, change in enumerate(CHANGES)
        for bits in (2, 3)
        for path in ("prefill", "decode")
    ]  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in TITLES:
        write_csv(tmp_path / f"accuracy-{name}.csv", rows(0.1))
        write_csv(tmp_path / f"accuracy-choices-{name}.csv", choices())
    return tmp_path


def test_every_setting_has_its_row_and_the_rest_of_the_page_stays(results: Path) -> None:
    page, plot = results / "accuracy.md", results / "accuracy.svg"
    page.write_text(MARKED)
    write_page(results, page, plot)
    text = page.read_text()
    assert text.startswith("before\n<!-- bars -->\n")
    assert "stale" not in text
    assert text.count("\nbetween\n") == 3
    for name in [one.name for one in ours()] + [n for names in RIVALS.values() for n in names]:
        assert text.count(f"| `{name}` |") == len(TITLES)
    # KVQuant's bits by its code, and by its paper in brackets.
    assert "| KVQuant | `kvquant3` | 3.000 (2.50) |" in text
    assert f"| check | {GARBAGE} | | 5.00 | | | | | | 5.00 |" in text
    # Of the first window 9 * 0.1 * 10**-2 over ten tokens.
    assert "KL 0.250000 token by token through the packed cache, 0.000900 in one forward." in text
    # Within two standard errors: in brackets.
    assert "(1.00) / (1.00)" in text
    assert " 1.00 " not in text
    first = plot.read_bytes(), page.read_bytes()
    write_page(results, page, plot)
    assert (plot.read_bytes(), page.read_bytes()) == first
    drawn = plot.read_text()
    assert all(method in drawn for method in (*RIVALS, AVERAGE, UNIFORM) if "KVQuant" not in method)


def test_bars_are_met_by_what_lies_below_them(results: Path) -> None:
    page = results / "accuracy.md"
    all_of_them = "4 of 4: kvq average 3.5, kvq average 3.25, kvq average 3, kvq 3"
    for factor, met in ((0.1, all_of_them), (0.9, "0 of 4")):
        for name in TITLES:
            write_csv(results / f"accuracy-{name}.csv", rows(factor))
        page.write_text(MARKED)
        write_page(results, page, results / "accuracy.svg")
        bars = [line for line in page.read_text().splitlines() if "best rival: ≤" in line]
        assert len(bars) == 3 * len(TITLES) * 2
        # Of three averages and one width from 3 to 3.5 bits, all measured on the prefill path.
        line = next(one for one in bars if one.startswith("| 3 to 3.5") and "| prefill" in one)
        assert line.endswith(f"| {met} |")
        # All settings lie on one straight line, so that no average is below it.
        assert "| 0% below |" in page.read_text().replace("above", "below")


def test_seeds_are_joined(results: Path) -> None:
    found = [row("kvq 2", "prefill", 2.0, kl, seed) for seed, kl in enumerate((0.1, 0.2, 0.3))]
    point = lines([{k: str(v) for k, v in one.items()} for one in found], "prefill")[UNIFORM][0]
    assert point.kl == pytest.approx(0.2)
    # Of the seeds 0.1 / sqrt(3), of the windows 0.02 (0.18 and 0.22).
    assert point.stderr == pytest.approx((0.01 / 3 + 0.02**2) ** 0.5)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers <!-- bars -->"):
        between("text", "bars", "table")
