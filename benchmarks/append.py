#!/usr/bin/env python3
"""What appending one token to a layer of the packed cache costs, at few and at many tokens held.

    python benchmarks/append.py [--held 1024 65536] [--rounds 16] [-o CSV]

Layers of the attention of Llama-3-8B that hold different numbers of tokens get the same tokens in
turn, one at a time; a round is 256 tokens, so that each layer packs one page in each. The stock
layer of transformers (which copies all that it holds) gets a few tokens beside them, for
comparison. Exit code 1 if the bar is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_llama import SHAPE, calibrated, random_llama, random_states
from results_csv import machine, write_csv
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.layer import PackedLayer
from kvq_runtime.page_codec import page_codecs

DEFAULT_CSV = Path(__file__).resolve().parent / "results" / "append.csv"
CHUNK = 4096
BAR = 1.1
"""Most that a token at the largest size may cost, in what it costs at the smallest."""

Append = Callable[[Tensor, Tensor], object]


def timed_in_turn(
    appends: list[Append], keys: Tensor, values: Tensor, *, first: int
) -> list[list[float]]:
    """Seconds of each token of ``[1, H, T, D]`` for each layer; who begins changes each token."""
    seconds: list[list[float]] = [[] for _ in appends]
    places = list(range(len(appends)))
    for t in range(keys.shape[2]):
        key, value = keys[:, :, t : t + 1], values[:, :, t : t + 1]
        turn = (first + t) % len(places)
        for place in places[turn:] + places[:turn]:
            begun = time.perf_counter()
            appends[place](key, value)
            seconds[place].append(time.perf_counter() - begun)
    return seconds


def filled(append: Append, parameters: object, tokens: int) -> None:
    """Bring a layer to ``tokens`` tokens, in chunks."""
    for start in range(0, tokens, CHUNK):
        append(*random_states(parameters, min(CHUNK, tokens - start), seed=start))


def row(
    cache: str, held: int, rounds: list[list[float]], smallest: list[list[float]] | None
) -> dict[str, object]:
    """One layer's line; ``smallest`` are the rounds of the layer that it is compared with."""
    tokens = [second for part in rounds for second in part]
    base = rounds if smallest is None else smallest
    base_tokens = [second for part in base for second in part]
    return {
        "cache": cache,
        "shape": SHAPE,
        "held": held,
        "tokens": len(tokens),
        "mean_us": 1e6 * statistics.fmean(tokens),
        "median_us": 1e6 * statistics.median(tokens),
        "slowest_us": 1e6 * max(tokens),
        "mean_ratio": statistics.fmean(tokens) / statistics.fmean(base_tokens),
        "median_ratio": statistics.median(tokens) / statistics.median(base_tokens),
        # A round of each layer lies in the same second, so that a busy machine slows both.
        "paired_ratio": statistics.median(
            statistics.fmean(ours) / statistics.fmean(theirs)
            for ours, theirs in zip(rounds, base, strict=True)
        ),
    }


def measure(
    held: list[int], *, bits: int, rounds: int, stock_tokens: int
) -> list[dict[str, object]]:
    """Rows of the packed layers, then of stock ones."""
    model = random_llama(layers=1, positions=2 * max(held), dtype=torch.float32)
    codec = page_codecs(model, calibrated(model, bits=bits))[0]
    parameters = codec.parameters.key
    packed, stock = [PackedLayer(codec) for _ in held], [DynamicLayer() for _ in held]
    for tokens, layer, other in zip(held, packed, stock, strict=True):
        filled(layer.append, parameters, tokens)
        filled(other.update, parameters, tokens)
    appends = [layer.append for layer in packed]
    # The first round is not counted: first calls of everything, and memory that is touched first.
    timed: list[list[list[float]]] = [[] for _ in held]
    for number in range(rounds + 1):
        states = random_states(parameters, PAGE_TOKENS, seed=-1 - number)
        seconds = timed_in_turn(appends, *states, first=number)
        if number:
            for parts, part in zip(timed, seconds, strict=True):
                parts.append(part)
    states = random_states(parameters, stock_tokens, seed=0)
    copied = timed_in_turn([layer.update for layer in stock], *states, first=0)
    return [
        *(row(f"kvq {bits} bit", h, part, timed[0]) for h, part in zip(held, timed, strict=True)),
        *(row("DynamicLayer", h, [s], [copied[0]]) for h, s in zip(held, copied, strict=True)),
    ]


def main() -> int:
    """Measure, write the file, print the table; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--held", type=int, nargs="+", default=[1024, 65536])
    parser.add_argument("--bits", type=int, default=3, choices=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=16, help="of 256 tokens")
    parser.add_argument("--stock-tokens", type=int, default=16, help="for DynamicLayer")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_CSV)
    options = parser.parse_args()

    where = machine()
    with torch.inference_mode():
        rows = measure(
            sorted(options.held),
            bits=options.bits,
            rounds=options.rounds,
            stock_tokens=options.stock_tokens,
        )
    met = True
    for line in rows:
        if line["cache"] != "DynamicLayer":
            line["bar"] = BAR
            line["met"] = max(float(str(line[k])) for k in ("median_ratio", "paired_ratio")) <= BAR
            met &= bool(line["met"])
        else:
            line |= {"bar": "", "met": ""}
    write_csv(options.output, [line | where for line in rows])
    print(f"appending one token; {SHAPE}; ratios to the smallest")
    layout = "{:<14} {:>8} {:>7} {:>10} {:>10} {:>12} {:>8} {:>8} {:>8}"
    print(
        layout.format(
            "cache",
            "held",
            "tokens",
            "mean us",
            "median us",
            "slowest us",
            "mean",
            "median",
            "paired",
        )
    )
    for line in rows:
        times = (f"{line[k]:.1f}" for k in ("mean_us", "median_us", "slowest_us"))
        ratios = (f"{line[k]:.3f}" for k in ("mean_ratio", "median_ratio", "paired_ratio"))
        print(layout.format(line["cache"], line["held"], line["tokens"], *times, *ratios))
    print(f"bar {BAR}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
