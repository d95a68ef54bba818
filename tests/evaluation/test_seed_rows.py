"""One row over sidecars that only their calibration seed tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath
from kvq_evaluation.report import EvaluationRow, table
from kvq_evaluation.seed_rows import group_name, seed_groups, with_seed_rows
from kvq_evaluation.statistics import WindowMetrics, over_seeds
from kvq_formats.sidecar import Sidecar
from tiny_sidecars import make_sidecar


def of_seed(seed: int, bits: int = 4, **options: Any) -> Sidecar:
    made = make_sidecar(bits, **options)
    drawn = {"seed": seed, "token_sha256": str(seed) * 64}
    return replace(made, calibration=made.calibration.model_copy(update=drawn))


def metrics(name: str, nll: float, kl: tuple[float, float]) -> WindowMetrics:
    return WindowMetrics.from_scores(name, [(10, nll, k, 9) for k in kl])


REFERENCE = metrics(UNQUANTIZED, 20.0, (0.0, 0.0))


def row(
    name: str, *, nll: float = 21.0, kl: tuple[float, float] = (0.5, 0.7), bits: float = 4.0,
    path: MeasuredPath = "prefill",
) -> EvaluationRow:  # fmt: skip
    return EvaluationRow.from_metrics(
        metrics(name, nll, kl), reference=REFERENCE, dataset="text", effective_bits=bits,
        effective_bits_total=bits + 1, path=path, attention_error={0: bits / 10, 1: 0.5},
    )  # fmt: skip


UNQUANTIZED_ROW = EvaluationRow.from_metrics(
    REFERENCE, reference=REFERENCE, dataset="text", effective_bits=16, effective_bits_total=16
)


def names_of(sidecars: Mapping[str, Sidecar]) -> list[tuple[str, ...]]:
    return [tuple(sorted(group)) for group in seed_groups(sidecars)]


def test_only_seeds_may_differ() -> None:
    first = {"a": of_seed(0), "b": of_seed(1)}
    assert names_of(first) == [("a", "b")]
    assert names_of({"a": of_seed(0), "b": of_seed(0)}) == []
    assert names_of({"a": of_seed(0), "b": of_seed(1, 3)}) == []
    assert names_of({"a": of_seed(0), "b": of_seed(1, outlier_fraction=0.02)}) == []
    # Of one seed the first counts.
    assert names_of({**first, "again": of_seed(1)}) == [("a", "b")]
    for name, changed in (("calibration", {"num_samples": 9}), ("base_model", {"id": "other"})):
        other = of_seed(1)
        record = getattr(other, name).model_copy(update=changed)
        assert names_of({"a": of_seed(0), "b": replace(other, **{name: record})}) == []


def test_widths_by_layer_may_differ_but_not_their_sum() -> None:
    sidecars = {
        "a": of_seed(0, layer_bits={0: (2, 3), 1: (3, 3)}),
        "b": of_seed(1, layer_bits={0: (3, 3), 1: (2, 3)}),
        # The largest of a layer is another one here.
        "c": of_seed(2, layer_bits={0: (2, 4), 1: (3, 2)}),
        "d": of_seed(3, layer_bits={0: (3, 3), 1: (3, 3)}),
        "e": of_seed(0, 3),
    }
    assert names_of(sidecars) == [("a", "b", "c")]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("q3-s0", "q3-s1"), "q3 over 2 seeds"),
        (("q2.75_seed0", "q2.75_seed1", "q2.75_seed2"), "q2.75 over 3 seeds"),
        (("sidecar 1", "sidecar 2"), "sidecar over 2 seeds"),
        (("q", "q-1"), "q over 2 seeds"),
        (("q10", "q11"), "q10 over 2 seeds"),
        (("a/q", "b/q"), "a/q over 2 seeds"),
    ],
)
def test_names(names: tuple[str, ...], found: str) -> None:
    assert group_name(names) == found
    assert group_name(names, taken=[found]) == f"{names[0]} over {len(names)} seeds"


def test_a_row_over_seeds_is_their_mean() -> None:
    seeds = [row("q-0", kl=(0.5, 0.7), bits=4), row("q-1", nll=22.0, kl=(0.9, 1.5), bits=3)]
    sidecars = {"q-0": of_seed(5), "q-1": of_seed(0)}
    rows = with_seed_rows([UNQUANTIZED_ROW, *seeds, row("kivi2")], sidecars)
    assert [one.name for one in rows] == [UNQUANTIZED, "q-0", "q-1", "q over 2 seeds", "kivi2"]
    assert rows[1:3] == seeds
    found = rows[3]
    assert found.seeds == (5, 0)
    runs = [one.metrics for one in seeds if one.metrics is not None]
    assert (found.kl, found.kl_stderr) == (over_seeds(runs).mean, over_seeds(runs).stderr)
    # 0.02 of two windows with means of 0.07 and 0.11, and 0.03 of two seeds with 0.06 and 0.12.
    assert (found.kl, found.kl_stderr) == pytest.approx((0.09, 0.0013**0.5))
    for name in ("perplexity", "perplexity_increase", "agreement", "effective_bits_total"):
        mean = sum(getattr(one, name) for one in seeds) / 2
        assert getattr(found, name) == pytest.approx(mean)
    assert found.effective_bits == 3.5
    assert found.attention_error == pytest.approx({0: 0.35, 1: 0.5})
    assert (found.windows, found.tokens) == (2, 20)
    assert found.perplexity_stderr is found.perplexity_increase_stderr is None
    json = found.to_json()
    assert json["seeds"] == [5, 0]
    assert "per_window" not in json
    assert "seeds" not in rows[1].to_json()
    assert table(rows).rows[3][0] == "q over 2 seeds"
    assert "±" in table(rows).rows[3][4]


def test_each_path_has_its_own() -> None:
    names, paths = ("q-0", "q-1"), ("prefill", "decode")
    rows = [row(name, path=path, kl=(k, k)) for k, path in ((0.5, "prefill"), (0.1, "decode"))
            for name in names]  # type: ignore[arg-type] # fmt: skip
    found = with_seed_rows(rows, {name: of_seed(i) for i, name in enumerate(names)})
    joined = {one.path: one.kl for one in found if one.seeds}
    assert joined == pytest.approx({"prefill": 0.05, "decode": 0.01})
    assert [one.path for one in found] == ["prefill"] * 3 + ["decode"] * 3
    assert set(paths) == set(joined)


def test_sidecars_of_one_seed_change_nothing() -> None:
    rows = [UNQUANTIZED_ROW, row("a"), row("b")]
    assert with_seed_rows(rows, {"a": of_seed(0), "b": of_seed(0)}) == rows
