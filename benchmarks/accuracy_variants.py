"""Which caches ``accuracy.py`` compares, and which pairs its bars are about."""

from __future__ import annotations

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


def configs(bits: int) -> dict[str, KVQConfig]:
    """Calibrated variants at one width, by name."""
    plain = {"outlier_fraction": 0.0, "qnorm": False}
    sparse = {"outlier_fraction": 0.01, "qnorm": False}
    options: dict[str, dict[str, object]] = {
        "unweighted": plain | {"sensitivity": "none"},
        "NUQ": plain,
        "NUQ, Q-Norm": plain | {"qnorm": True},
        "unweighted + 1 %": sparse | {"sensitivity": "none"},
        "NUQ + 1 %": sparse,
        "NUQ + 1 %, Q-Norm": sparse | {"qnorm": True},
        "NUQ + 1 %, head grain": sparse | {"value_grain": "head"},
        "NUQ + 1 %, key room 1.5 %": sparse | {"outlier_capacity": 0.015},
        "NUQ + 1 %, key room 0.75 %": sparse | {"outlier_capacity": 0.0075},
        "NUQ + 1 %, value room 1.0": sparse | {"value_capacity_factor": 1.0},
        "NUQ + 1 %, value room 1.5": sparse | {"value_capacity_factor": 1.5},
    }
    widths = {"key_bits": bits, "value_bits": bits}
    return {
        f"{bits} bit {name}": KVQConfig.create(**widths, **given) for name, given in options.items()
    }


def baselines(bits: int, layers: tuple[int, ...]) -> dict[str, Baseline]:
    """Methods without calibration at one width, by name."""
    return {
        f"Hadamard-int{bits} a token-head": HadamardInt(bits=bits, layers=layers),
        f"int{bits} a token": IntPerToken(bits=bits, layers=layers),
    }


def comparisons(bits: int) -> list[Comparison]:
    """Pairs worth a paired standard error at one width."""
    nuq, ours = f"{bits} bit NUQ", f"{bits} bit NUQ + 1 %"
    pairs = [
        Comparison(nuq, f"{bits} bit unweighted", bar="NUQ < unweighted NUQ"),
        Comparison(ours, f"{bits} bit unweighted + 1 %"),
        Comparison(ours, nuq),
        Comparison(ours, f"int{bits} a token"),
    ]
    hadamard = f"Hadamard-int{bits} a token-head"
    bar = f"{bits} bit + 1 % <= 0.5 x Hadamard-int{bits}" if bits < 4 else ""
    pairs.append(Comparison(ours, hadamard, factor=0.5, bar=bar))
    pairs.append(Comparison(f"{nuq}, Q-Norm", nuq))
    choices = [name for name in configs(bits) if name.startswith(f"{ours}, ")]
    pairs.extend(Comparison(choice, ours) for choice in choices)
    return pairs


def garbage(sidecar: Sidecar) -> Sidecar:
    """A sidecar whose codes decode to the number on the other side of the centre."""

    def mirrored(layer: LayerParameters) -> LayerParameters:
        key, value = (
            replace(part, codebook=replace(part.codebook, levels=part.codebook.levels.flip(0)))
            for part in (layer.key, layer.value)
        )
        return LayerParameters(key=key, value=value)  # type: ignore[arg-type]

    return replace(sidecar, layers={i: mirrored(layer) for i, layer in sidecar.layers.items()})
