"""What a sidecar or a baseline becomes on a path: a context to run in, and how it is driven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from kvq_evaluation.baselines.named import Baseline
from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath, Variant
from kvq_formats.errors import ConfigError
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach
from kvq_runtime.evaluation_rule import attach_codec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RULES: Final[Mapping[MeasuredPath, Literal["evaluation", "runtime"]]] = {
    "prefill": "evaluation",
    "decode": "runtime",
}


@dataclass(frozen=True)
class PathVariant:
    """One cache on one path.

    Fields:
        name, path: of its row.
        context: inside it the model runs with the cache.
        forwards: how it is driven. A sidecar decodes token by token; a baseline, which has no
            packed cache, in one forward that reads what its cache would.
    """

    name: str
    path: MeasuredPath
    context: Variant
    forwards: MeasuredPath


def cache_variants(
    model: PreTrainedModel,
    sidecars: Mapping[str, Sidecar],
    baselines: Mapping[str, Baseline] | None = None,
    *,
    path: MeasuredPath | Sequence[MeasuredPath],
) -> dict[str, PathVariant]:
    """Every cache on every path, path by path, by a name that no other has.

    Raises ConfigError for an unknown path, for a sidecar and a baseline of one name, and for one
    named as the unquantized model.
    """
    paths = (path,) if isinstance(path, str) else tuple(path)
    held: dict[str, PathVariant] = {}
    _check_names(sidecars, baselines or {})
    for one in paths:
        if one not in RULES:
            raise ConfigError(
                f"path is {one!r}, expected 'prefill' or 'decode'.", hint="--path prefill"
            )
        rule = RULES[one]
        for name, sidecar in sidecars.items():
            context: Variant = partial(attach, model, sidecar, rule=rule)
            held[_variant_name(name, one, paths)] = PathVariant(name, one, context, one)
        for name, codec in (baselines or {}).items():
            context = partial(attach_codec, model, codec, rule=rule)
            held[_variant_name(name, one, paths)] = PathVariant(name, one, context, "prefill")
    return held


def row_of_variant(held: Mapping[str, PathVariant]) -> dict[str, tuple[str, MeasuredPath]]:
    """The name and path of each variant's row, the unquantized model's first."""
    rows: dict[str, tuple[str, MeasuredPath]] = {UNQUANTIZED: (UNQUANTIZED, "prefill")}
    return rows | {variant: (one.name, one.path) for variant, one in held.items()}


def _check_names(sidecars: Mapping[str, Sidecar], baselines: Mapping[str, Baseline]) -> None:
    if UNQUANTIZED in {*sidecars, *baselines}:
        raise ConfigError(
            f"a cache is named {UNQUANTIZED!r}, the name of the first row.",
            hint="rename the sidecar's folder",
        )
    for name in sorted({*sidecars} & {*baselines}):
        raise ConfigError(
            f"a sidecar and a baseline are both named {name!r}.",
            hint="rename the sidecar's folder",
        )


def _variant_name(name: str, path: MeasuredPath, paths: Sequence[MeasuredPath]) -> str:
    return name if len(paths) == 1 else f"{name} ({path})"
