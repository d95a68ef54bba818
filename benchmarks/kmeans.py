"""Codebook fit against scikit-learn on the same weighted points, side by side in one run.

    python benchmarks/kmeans.py [--points 4000000 33500000] [--entries 8] [-o CSV]
    python benchmarks/kmeans.py --activations FILE.safetensors

Ours is timed from the points to the codebook, binning included, and its error is taken on the
points themselves, as scikit-learn's is. 33,500,000 points are the keys of one layer of an 8B model
over 16 x 2048 tokens. Times on a machine that does other work are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from results_csv import machine, write_csv
from safetensors.torch import load_file
from torch import Tensor

from kvq_calibration.kmeans import WeightedBins, fit_codebook

DEFAULT_CSV = Path(__file__).resolve().parent / "results" / "kmeans.csv"
TOKENS = 2048
CHUNK = 1 << 20
MAX_ERROR_RATIO = 1.001
SPEED_BARS = {"auto": 5.0, "10": 30.0}
"""Least ratio of scikit-learn's time to ours, by its ``n_init``."""

LARGE = 33_500_000
LARGE_SPEED_BAR = 20.0
"""The ratio asked of ``n_init="auto"`` from ``LARGE`` points on."""


def synthetic_points(num: int) -> tuple[Tensor, Tensor]:
    """Inliers of many channels, each of its own shape and scale; z and weight f32 ``[num]``.

    A channel is normal, Laplace, Student's t with 3 degrees of freedom, or has two modes. It is
    normalised by its own 0.5 % and 99.5 % quantiles, and weights are squared normal gradients
    times half_range^2, both of scales that differ by orders of magnitude between channels.
    """
    source = torch.Generator().manual_seed(0)
    # Outliers, 1 %, are dropped: 98 % of a channel is always left.
    channels = num // (TOKENS * 98 // 100) + 1
    z, weight, filled = torch.empty(num), torch.empty(num), 0
    for channel in range(channels):
        normal, other, third, fourth = torch.randn(4, TOKENS, generator=source)
        shape = [
            normal,
            # The sum of two squared normals is exponential; with a sign, Laplace.
            normal.square().add(other.square()).mul(third.sign()),
            normal / (other.square() + third.square() + fourth.square()).div(3).sqrt(),
            normal / 2 + 1.5 * other.sign(),
        ][channel % 4]
        half_range, gradient = torch.exp(torch.randn(2, generator=source) * torch.tensor([0.7, 2]))
        lower, upper = torch.quantile(shape, torch.tensor([0.005, 0.995]))
        inlier = (shape >= lower) & (shape <= upper)
        kept = ((shape - (lower + upper) / 2) / ((upper - lower) / 2))[inlier][: num - filled]
        squares = torch.randn(len(kept), generator=source).mul_(gradient * 1e-5).square_()
        z[filled : filled + len(kept)] = kept
        weight[filled : filled + len(kept)] = squares * half_range**2
        filled += len(kept)
    return z, weight


def raw_error(z: Tensor, weight: Tensor, entries: Tensor) -> float:
    """Sum of weight * (z - nearest entry)^2 over the points, in f64."""
    midpoints = (entries[1:] + entries[:-1]) / 2
    total = 0.0
    for points, masses in zip(z.split(CHUNK), weight.split(CHUNK), strict=True):
        gap = points.double() - entries.double()[torch.bucketize(points, midpoints)]
        total += float(masses.double() @ gap.square())
    return total


def fit_ours(z: Tensor, weight: Tensor, num_entries: int) -> tuple[Tensor, float]:
    """Codebook f32 ``[N]`` and seconds, from the points on."""
    begun = time.perf_counter()
    bins = WeightedBins()
    bins.add(z, weight)
    entries = fit_codebook(bins, num_entries)
    return entries, time.perf_counter() - begun


def fit_sklearn(z: Tensor, weight: Tensor, num_entries: int, n_init: str) -> tuple[Tensor, float]:
    """The same by scikit-learn; entries f32 ``[N]``, sorted."""
    from sklearn.cluster import KMeans

    judge = KMeans(
        n_clusters=num_entries,
        n_init="auto" if n_init == "auto" else int(n_init),
        max_iter=50,
        random_state=0,
    )
    points, masses = z[:, None].numpy(), weight.numpy()
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge.fit(points, sample_weight=masses)
    seconds = time.perf_counter() - begun
    return torch.from_numpy(np.sort(judge.cluster_centers_[:, 0]).astype(np.float32)), seconds


def compare(
    z: Tensor, weight: Tensor, *, source: str, num_entries: int, repeats: int, restarts: list[str]
) -> list[dict[str, object]]:
    """One row a method; ours is the median of ``repeats`` fits, scikit-learn runs once."""
    fits = [fit_ours(z, weight, num_entries) for _ in range(repeats)]
    entries = fits[0][0]
    seconds = statistics.median(s for _, s in fits)
    error = raw_error(z, weight, entries)
    identical = all(torch.equal(entries, other) for other, _ in fits)
    common = {"source": source, "points": len(z), "entries": num_entries}
    rows = [
        common
        | {"method": "kvq", "seconds": seconds, "times_ours": 1.0, "speed_bar": ""}
        | {
            "weighted_error": error,
            "ours_over_theirs": 1.0,
            "identical": identical,
            "met": identical,
        }
    ]
    for n_init in restarts:
        theirs, their_seconds = fit_sklearn(z, weight, num_entries, n_init)
        their_error = raw_error(z, weight, theirs)
        bar = SPEED_BARS[n_init]
        if n_init == "auto" and len(z) >= LARGE:
            bar = LARGE_SPEED_BAR
        ratio, error_ratio = their_seconds / seconds, error / their_error
        rows.append(
            common
            | {"method": f"sklearn n_init={n_init}", "seconds": their_seconds}
            | {"times_ours": ratio, "speed_bar": bar, "weighted_error": their_error}
            | {"ours_over_theirs": error_ratio, "identical": ""}
            | {"met": ratio >= bar and error_ratio <= MAX_ERROR_RATIO}
        )
    return rows


def environment() -> dict[str, object]:
    """Columns that say where the figures come from."""
    return machine() | {"scikit_learn": version("scikit-learn"), "numpy": version("numpy")}


def show(rows: list[dict[str, object]]) -> None:
    """Print the table."""
    layout = "{:>12} {:>3}  {:<20} {:>9} {:>8} {:>6} {:>17}  {}"
    print(
        layout.format("points", "N", "method", "seconds", "x ours", "bar", "ours/their error", "")
    )
    for row in rows:
        bar = f"{row['speed_bar']:g}" if row["speed_bar"] else ""
        note = "met" if row["met"] else "MISSED"
        if row["method"] == "kvq":
            note = "identical on repetition" if row["identical"] else "NOT IDENTICAL"
        print(
            layout.format(
                f"{row['points']:,}",
                f"{row['entries']}",
                f"{row['method']}",
                f"{row['seconds']:.3f}",
                f"{row['times_ours']:.1f}",
                bar,
                f"{row['ours_over_theirs']:.5f}",
                note,
            )
        )


def main() -> int:
    """Run the comparison; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, nargs="+", default=[4_000_000, LARGE])
    parser.add_argument(
        "--activations",
        type=Path,
        help="safetensors with z and weight, float tensors of one shape, instead of --points",
    )
    parser.add_argument("--entries", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="fits of ours")
    parser.add_argument(
        "--ten-restarts-up-to",
        type=int,
        default=10_000_000,
        help="points beyond which scikit-learn runs with n_init=auto only",
    )
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_CSV)
    options = parser.parse_args()

    where = environment()
    rows: list[dict[str, object]] = []
    for size in options.points if options.activations is None else [0]:
        if options.activations is None:
            source = "synthetic"
            z, weight = synthetic_points(size)
        else:
            source = options.activations.name
            tensors = load_file(options.activations)
            z, weight = (tensors[name].float().flatten() for name in ("z", "weight"))
        restarts = ["auto", "10"] if len(z) <= options.ten_restarts_up_to else ["auto"]
        rows += compare(
            z,
            weight,
            source=source,
            num_entries=options.entries,
            repeats=options.repeats,
            restarts=restarts,
        )
        # On disk before anything is drawn, and again after each size.
        write_csv(options.output, [row | where for row in rows])
    show(rows)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
