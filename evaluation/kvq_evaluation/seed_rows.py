"""Rows over calibration seeds: what sidecars reach together that differ in nothing else.

Which windows of the calibration text are drawn changes what a sidecar costs. Where the same
calibration was done with several seeds, their mean says more of its options than any one of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from kvq_evaluation.report import EvaluationRow
from kvq_evaluation.statistics import over_seeds
from kvq_formats.sidecar import Sidecar


def with_seed_rows(
    rows: Sequence[EvaluationRow], sidecars: Mapping[str, Sidecar]
) -> list[EvaluationRow]:
    """All rows of one text, and on each path one more behind the last sidecar of each group.

    Args:
        rows: as ``evaluate_caches`` gives them, with their window sums.
        sidecars: by the name of their rows.
    """
    groups = seed_groups(sidecars)
    names: list[str] = []
    for group in groups:
        names.append(group_name(group, taken=[*(row.name for row in rows), *names]))
    joined: list[EvaluationRow] = []
    for row in rows:
        joined.append(row)
        for name, group in zip(names, groups, strict=True):
            if row.name == group[-1]:
                members = [one for one in rows if one.path == row.path and one.name in group]
                seeds = [sidecars[one.name].calibration.seed for one in members]
                joined.append(_over_seeds(name, members, seeds))
    return joined


def seed_groups(sidecars: Mapping[str, Sidecar]) -> list[tuple[str, ...]]:
    """Names of sidecars that only the seed of their calibration tells apart, two or more a group.

    They agree in base model, calibration text and options. Widths that were chosen layer by layer
    may differ by seed, but not their sum: another sum is another average that was asked for. Of
    sidecars of one seed the first counts.
    """
    groups: dict[object, dict[int, str]] = {}
    for name, sidecar in sidecars.items():
        text = sidecar.calibration
        found = groups.setdefault(_all_but_seed(sidecar), {})
        found.setdefault(text.seed, name)
    return [tuple(names.values()) for names in groups.values() if len(names) > 1]


def group_name(names: Sequence[str], *, taken: Collection[str] = ()) -> str:
    """``q3 over 2 seeds`` for ``q3-s0`` and ``q3-s1``: the words that all names begin with.

    The first name where they share no word, or where that name is among ``taken``.
    """
    suffix = f" over {len(names)} seeds"
    words = [re.findall(r"[^-_. ]+", name) for name in names]
    shared = 0
    while all(len(one) > shared and one[: shared + 1] == words[0][: shared + 1] for one in words):
        shared += 1
    ends = [word.end() for word in re.finditer(r"[^-_. ]+", names[0])]
    short = (names[0][: ends[shared - 1]] if shared else names[0]) + suffix
    return short if short not in taken else names[0] + suffix


def _all_but_seed(sidecar: Sidecar) -> str:
    """What sidecars of a group agree in, as text."""
    options = sidecar.config.model_dump(mode="json")
    if widths := options.pop("layer_bits", None):
        del options["key_bits"], options["value_bits"]
        options["sum_of_layer_bits"] = sum(map(sum, widths.values()))
    # The seed decides which tokens are drawn, and so their hash.
    text = sidecar.calibration.model_dump(mode="json", exclude={"seed", "token_sha256"})
    return repr((options, sidecar.base_model.model_dump(mode="json"), text))


def _over_seeds(name: str, members: Sequence[EvaluationRow], seeds: Sequence[int]) -> EvaluationRow:
    windows = [row.metrics for row in members if row.metrics is not None]
    assert len(windows) == len(members)
    kl = over_seeds(windows)
    of_layers = [row.attention_error for row in members]
    return replace(
        members[0],
        name=name,
        perplexity=fmean(row.perplexity for row in members),
        perplexity_stderr=None,
        perplexity_increase=fmean(row.perplexity_increase for row in members),
        perplexity_increase_stderr=None,
        kl=kl.mean,
        kl_stderr=kl.stderr,
        kl_median=_mean_of_known([row.kl_median for row in members]),
        kl_p99=_mean_of_known([row.kl_p99 for row in members]),
        agreement=fmean(row.agreement for row in members),
        effective_bits=fmean(row.effective_bits for row in members),
        effective_bits_total=fmean(row.effective_bits_total for row in members),
        attention_error={
            layer: fmean(errors[layer] for errors in of_layers) for layer in of_layers[0]
        },
        seeds=tuple(seeds),
        metrics=None,
    )


def _mean_of_known(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return fmean(known) if len(known) == len(numbers) else None
