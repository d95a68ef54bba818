#!/usr/bin/env python3
"""How far the lanes of a side pass walk: the longest run of outliers among neighbours.

    python benchmarks/outlier_runs.py [-o CSV]

The embedded model, calibrated with the defaults, reads the dev text into packed pages. A program of
``key_outlier_scores`` walks as far as the longest run among its 32 tokens (64 on AMD), one of
``value_outlier_sums`` among its 32 or 64 channels. The CSV is the histogram; budgets of
instructions (``kernel_budgets.csv``) charge its mean, to one decimal.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from results_csv import provenance, write_csv
from torch import Tensor

import kvq
from kvq_calibration.data import load_text, token_windows
from kvq_runtime.cache import PackedCache, packed_layers
from kvq_runtime.models import load_model, resolve_model

DEFAULT_CSV = Path(__file__).resolve().parent / "results" / "outlier-runs.csv"
LANES = (32, 64)
SEQ_LEN, WINDOWS = 2048, 8


def main() -> int:
    """Count, write the CSV, print the means."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_CSV)
    options = parser.parse_args()
    path = kvq.embedded_model_path()
    sidecar = kvq.calibrate(str(path), bits=3)
    loaded = load_model(resolve_model(str(path)), dtype="float32")
    text = load_text("builtin:dev", purpose="eval")
    windows = token_windows(loaded.tokenizer, text, num_windows=WINDOWS, seq_len=SEQ_LEN).input_ids
    cache = PackedCache(loaded.model, sidecar)
    with torch.inference_mode(), kvq.attach(loaded.model, sidecar, rule="exact-prefill"):
        loaded.model(windows, past_key_values=cache)
    shared = provenance(loaded.model, name="embedded", seq_len=SEQ_LEN)
    rows = []
    for kind, lanes, runs in histograms(cache):
        for longest, count in sorted(Counter(runs.tolist()).items()):
            rows.append(
                {"pass": kind, "lanes": lanes, "longest_run": longest, "programs": count, **shared}
            )
        print(f"{kind} {lanes} lanes: {runs.double().mean():.2f} steps on average")
    write_csv(options.output, rows)
    return 0


def histograms(cache: PackedCache) -> Iterator[tuple[str, int, Tensor]]:
    """Longest run of each program, for each pass and width of a warp."""
    keys, values = [], []
    for layer in packed_layers(cache):
        used = [page for row in layer.rows for page in row.pages]
        for key, value in layer.pool.read(used):
            keys.append(key.outlier_counts.long())
            values.append(value.outlier_offsets.long().diff(dim=-1))
    for kind, runs in (("keys", torch.cat(keys)), ("values", torch.cat(values))):
        for lanes in LANES:
            yield kind, lanes, runs.unflatten(-1, (-1, lanes)).amax(-1).flatten()


if __name__ == "__main__":
    sys.exit(main())
