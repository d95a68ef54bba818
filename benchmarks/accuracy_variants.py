"""Which caches ``accuracy.py`` compares, and which pairs its bars are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvq_evaluation.baselines.hadamard_int import HadamardInt
from kvq_evaluation.baselines.int_per_token import IntPerToken
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import LayerParameters
from kvq_formats.sidecar import Sidecar

Baseline = HadamardInt | IntPerToken

GARBAGE = "garbage codebook"


@dataclass(frozen=True)
class Comparison:
    """KL of ``variant`` against ``factor`` times the KL of ``other``, window by window.

    ``bar`` says what must hold; it is empty where the pair only informs a default.
    """

    variant: str
    other: str
    factor: float = 1.0
    bar: str = ""


def ours(bits: int) -> str:
    """Name of the variant that has every default."""
    return f"{bits} bit NUQ + 1 %"


def configs(bits: int) -> dict[str, KVQConfig]:
    """The ladder at one width, by name: each rung adds one idea, the last is the default."""
    ladder: dict[str, dict[str, object]] = {
        f"{bits} bit unweighted": {"outlier_fraction": 0.0, "sensitivity": "none"},
        f"{bits} bit NUQ": {"outlier_fraction": 0.0},
        f"{bits} bit unweighted + 1 %": {"sensitivity": "none"},
        ours(bits): {},
    }
    return _configs(bits, ladder)


def choices(bits: int) -> dict[str, tuple[str, KVQConfig]]:
    """Defaults changed one at a time: name -> (the variant it is compared with, configuration)."""
    default = KVQConfig()
    qnorm = "Q-Norm off" if default.qnorm else "Q-Norm on"
    grain = "head" if default.value_grain == "token" else "token"
    changed: dict[str, dict[str, object]] = {
        f"{ours(bits)}, {qnorm}": {"qnorm": not default.qnorm},
        f"{ours(bits)}, {grain} grain": {"value_grain": grain},
    }
    for room in {0.0075, 0.01, 0.0125, 0.015} - {default.outlier_capacity}:
        changed[f"{ours(bits)}, key room {100 * room:g} %"] = {"outlier_capacity": room}
    for room in {1.0, 1.25, 1.5} - {default.value_capacity_factor}:
        changed[f"{ours(bits)}, value room {room:g}"] = {"value_capacity_factor": room}
    dense = {f"{bits} bit NUQ, {qnorm}": {"outlier_fraction": 0.0, "qnorm": not default.qnorm}}
    found = {name: (ours(bits), made) for name, made in _configs(bits, changed).items()}
    found |= {name: (f"{bits} bit NUQ", made) for name, made in _configs(bits, dense).items()}
    return dict(sorted(found.items()))


def _configs(bits: int, options: Mapping[str, Mapping[str, object]]) -> dict[str, KVQConfig]:
    return {
        name: KVQConfig.create(key_bits=bits, value_bits=bits, **given)
        for name, given in options.items()
    }


def baselines(bits: int, layers: tuple[int, ...]) -> dict[str, Baseline]:
    """Methods without calibration at one width, by name."""
    return {
        f"Hadamard-int{bits} a token-head": HadamardInt(bits=bits, layers=layers),
        f"int{bits} a token": IntPerToken(bits=bits, layers=layers),
    }


def comparisons(bits: int) -> list[Comparison]:
    """Pairs of the ladder and the baselines that are worth a paired standard error."""
    nuq, best = f"{bits} bit NUQ", ours(bits)
    hadamard = f"Hadamard-int{bits} a token-head"
    bar = f"{bits} bit + 1 % <= 0.5 x Hadamard-int{bits}" if bits < 4 else ""
    return [
        Comparison(nuq, f"{bits} bit unweighted", bar="NUQ < unweighted NUQ"),
        Comparison(best, f"{bits} bit unweighted + 1 %"),
        Comparison(best, nuq),
        Comparison(best, f"int{bits} a token"),
        Comparison(best, hadamard, factor=0.5, bar=bar),
    ]


def garbage(sidecar: Sidecar) -> Sidecar:
    """A sidecar whose codes decode to the number on the other side of the centre."""

    def mirrored(layer: LayerParameters) -> LayerParameters:
        key, value = (
            replace(part, codebook=replace(part.codebook, levels=part.codebook.levels.flip(0)))
            for part in (layer.key, layer.value)
        )
        return LayerParameters(key=key, value=value)  # type: ignore[arg-type]

    return replace(sidecar, layers={i: mirrored(layer) for i, layer in sidecar.layers.items()})
