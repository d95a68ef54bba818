"""Which caches ``accuracy.py`` compares: ours, and the settings of every rival.

Rivals' settings were written down before any of ours was tuned: each method at the widths and group
sizes that its paper or its code has, so that its figures span the bits that ours take.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvq_formats.config import KVQConfig

SEEDS = (0, 1, 2)
"""Windows of calibration text that calibrated caches are fitted on anew."""


@dataclass(frozen=True)
class Ours:
    """One way to calibrate.

    Fields:
        name: in tables and CSVs.
        line: what it is a point of in the plot.
        config: the options; widths are not used where there is an average.
        average_bits: of widths chosen by expected loss, or None.
        seeds: how many of ``SEEDS`` it is calibrated with.
    """

    name: str
    line: str
    config: KVQConfig
    average_bits: float | None = None
    seeds: int = 1


UNIFORM, AVERAGE = "kvq --bits", "kvq --average-bits"
BARE = "kvq --average-bits, no outliers"
PAPER = "kvq, the paper's method"
LINES = (AVERAGE, UNIFORM, BARE, PAPER)
"""Ways to calibrate; the last is KVQuant's mathematics in kvq's bytes."""

WIDTHS = (2, 3, 4)
AVERAGES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
SEEDED_AVERAGES = (2.25, 2.75, 3.0, 3.75)
BARE_AVERAGES = (2.25, 3.0, 3.75)

GARBAGE = "garbage codebook"

STEPPED, TOKEN_BY_TOKEN = "kvq 2", "kvq 2, token by token"
"""The setting that is also decoded token by token through its packed cache, on one window."""


def ours() -> list[Ours]:
    """Every setting of ours."""
    found = []
    for bits in WIDTHS:
        uniform = KVQConfig.create(key_bits=bits, value_bits=bits)
        found.append(Ours(f"kvq {bits}", UNIFORM, uniform, seeds=len(SEEDS)))
        paper = KVQConfig.create(key_bits=bits, value_bits=bits, feedback=False, range_margin=1.0)
        found.append(Ours(f"kvq {bits}, no feedback", PAPER, paper))
    for average in AVERAGES:
        seeds = len(SEEDS) if average in SEEDED_AVERAGES else 1
        found.append(Ours(f"kvq average {average:g}", AVERAGE, KVQConfig(), average, seeds))
    bare = KVQConfig(outlier_fraction=0.0)
    found += [
        Ours(f"kvq average {average:g}, no outliers", BARE, bare, average)
        for average in BARE_AVERAGES
    ]
    return found


RIVALS: dict[str, tuple[str, ...]] = {
    "int a token-head": ("int2", "int3", "int4"),
    "int a token": ("int-token2", "int-token3", "int-token4"),
    "NormalFloat": ("nf2", "nf3", "nf4"),
    "KIVI": (
        "kivi2-g128", "kivi2-g64", "kivi2-g32", "kivi3-g128", "kivi3-g64", "kivi4-g128",
        "kivi4-g64",
    ),
    "Hadamard + int": ("hadamard2", "hadamard3", "hadamard4"),
    "TurboQuant": ("turboquant2", "turboquant3", "turboquant4"),
    "TurboQuant, norm corrected": ("turboquant-nc2", "turboquant-nc3", "turboquant-nc4"),
    "OSCAR": ("oscar2", "oscar3", "oscar4"),
    "OSCAR, a rotation a head": ("oscar-head2", "oscar-head3", "oscar-head4"),
    "RotateKV": ("rotatekv2", "rotatekv3", "rotatekv4"),
    "QServe": ("qserve3", "qserve4"),
    "GEAR": ("gear2", "gear3"),
    "ZipCache": ("zipcache",),
    "MiKV": ("mikv",),
    "VidKV": ("vidkv",),
    "FP8": ("fp8",),
    "NVFP4": ("nvfp4",),
    "KVQuant": ("kvquant2", "kvquant3", "kvquant4"),
}  # fmt: skip
"""Method -> its settings by the names that ``kvq eval --baseline`` takes."""

PAPER_BITS = "KVQuant, bits as its paper counts"
"""The same caches as KVQuant's, without what its code allocates beyond the paper's count."""

SEEDED = ("kvquant",)
"""Calibrated rivals that are fitted on every seed's text; the others on the first one's."""
