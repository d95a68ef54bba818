"""What accuracy is held to: KL of ours over that of the best rival at as many bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accuracy_caches import PAPER_BITS


@dataclass(frozen=True)
class Point:
    """A cache's place in the plot.

    Fields:
        bits: effective bits.
        kl: mean over seeds, nats a token.
        stderr: of windows and seeds together; None where it is unknown.
    """

    name: str
    bits: float
    kl: float
    stderr: float | None = None


@dataclass(frozen=True)
class AtBits:
    """A rival's KL at some number of bits, and the settings that it was read between."""

    kl: float
    stderr: float
    settings: str


NEAR_BITS = 0.25
"""A method whose fewest bits are so few more is held against a cache all the same."""


def at_bits(settings: Sequence[Point], bits: float) -> AtBits | None:
    """KL of a method at ``bits``: a straight line in log KL between neighbouring settings.

    A little below the method's fewest bits its smallest setting stands for it, which has more bits
    than is asked for and so flatters the method. Elsewhere there is nothing: None.
    """
    ordered = sorted(settings, key=lambda point: point.bits)
    if not ordered or not ordered[0].bits - NEAR_BITS <= bits <= ordered[-1].bits:
        return None
    if bits <= ordered[0].bits:
        only = ordered[0]
        return AtBits(only.kl, only.stderr or 0.0, only.name)
    upper = next(i for i, point in enumerate(ordered) if point.bits >= bits)
    a, b = ordered[upper - 1], ordered[upper]
    share = (bits - a.bits) / (b.bits - a.bits)
    kl = math.exp((1 - share) * math.log(a.kl) + share * math.log(b.kl))
    relative = math.hypot((1 - share) * (a.stderr or 0.0) / a.kl, share * (b.stderr or 0.0) / b.kl)
    return AtBits(kl, kl * relative, f"{a.name} and {b.name}")


KVQUANT = (PAPER_BITS,)
"""By the bits that its paper counts, which are fewer than its code allocates."""

BELOW_THE_LINE = 0.2
"""How far ``--average-bits 2.75`` should lie under the line between 2 and 3 bits."""


@dataclass(frozen=True)
class Bar:
    """A claim: some setting of ours within ``bits`` has at most ``factor`` times the KL.

    Fields:
        name: what it is about.
        bits: least and most effective bits of ours.
        factor: of the best rival's KL.
        rivals: methods that are meant; None: all but KVQuant.
    """

    name: str
    bits: tuple[float, float]
    factor: float
    rivals: tuple[str, ...] | None = None


BARS = (
    Bar("3 to 3.5 bits, best rival", (3.0, 3.5), 0.4),
    Bar("2.2 to 2.5 bits, best rival", (2.2, 2.5), 0.4),
    Bar("about 4.3 bits, best rival", (4.0, 4.5), 0.6),
    Bar("2 bits, KVQuant", (2.0, 2.6), 0.75, KVQUANT),
    Bar("3 bits, KVQuant", (3.0, 3.6), 0.75, KVQUANT),
    Bar("4 bits, KVQuant", (4.0, 4.6), 0.75, KVQUANT),
)


@dataclass(frozen=True)
class Verdict:
    """How a setting of ours stands to the best rival.

    Fields:
        ratio: our KL over the rival's.
        met: whether ours is below ``factor`` times the rival's by two standard errors.
    """

    bar: Bar
    ours: Point
    rival: str
    at: AtBits
    ratio: float
    met: bool


def judge(bar: Bar, ours: Sequence[Point], rivals: Mapping[str, Sequence[Point]]) -> list[Verdict]:
    """Every setting of ours in the bar's range against the best rival at its bits."""
    verdicts = []
    for point in ours:
        if not bar.bits[0] <= point.bits <= bar.bits[1]:
            continue
        found = {
            method: value
            for method, settings in rivals.items()
            if (method in bar.rivals if bar.rivals else not method.startswith("KVQuant"))
            and (value := at_bits(settings, point.bits)) is not None
        }
        if not found:
            continue
        rival = min(found, key=lambda method: found[method].kl)
        best = found[rival]
        error = math.hypot(point.stderr or 0.0, bar.factor * best.stderr)
        met = point.kl + 2 * error < bar.factor * best.kl
        verdicts.append(Verdict(bar, point, rival, best, point.kl / best.kl, met))
    return sorted(verdicts, key=lambda verdict: verdict.ratio)


def below_the_line(two: Point, between: Point, three: Point) -> float:
    """How far a setting lies under the straight line (log KL) between two others: 0.2 is 20 %."""
    line = at_bits([two, three], between.bits)
    assert line is not None
    return 1 - between.kl / line.kl
