#!/usr/bin/env python3
"""Peak memory of a long packed cache against the memory plan, and against 16 bits.

    python benchmarks/cache_memory.py [--tokens 65536] [--layers 32] [--bits 2 3 4] [-o CSV]

A model with the attention and the layers of Llama-3-8B and little else gets a cache of ``--tokens``
tokens. Most are put in as random keys and values, in chunks; the last ``--prefill-chunk`` are a
chunk of a prompt that the model reads, and the very last is a decoding step, so that attention over
all pages takes its scratch memory. Each width runs in a process of its own, whose peak (resident
set) is counted from what was resident before the cache was made: a copy of keys or values in any
other form would show in it. What the allocator keeps of freed blocks is part of the peak and of no
plan. Exit code 1 if the bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from process_memory import in_own_process, peak_bytes, reset_peak, settled_bytes
from random_llama import SHAPE, calibrated, random_ids, random_llama, random_states
from results_csv import machine, write_csv

import kvq
from kvq_runtime.cache import PackedCache, packed_layers

DEFAULT_CSV = Path(__file__).resolve().parent / "results" / "cache-memory.csv"
BAR = 0.05
"""Most that the peak may differ from the plan, as a share of the plan."""


def measure(*, tokens: int, layers: int, bits: int, prefill_chunk: int) -> dict[str, object]:
    """Fill one cache and read it, in this process."""
    model = random_llama(layers=layers, positions=tokens, dtype=torch.float32)
    sidecar = calibrated(model, bits=bits)
    plan = kvq.plan_memory(model, sidecar, context=tokens, prefill_chunk=prefill_chunk)
    with kvq.attach(model, sidecar):
        # What the libraries allocate when they are used for the first time is not the cache's.
        model(random_ids(1, 600))
        before = settled_bytes()
        reset_peak()
        cache = PackedCache(model, sidecar, capacity=tokens)
        allocated = settled_bytes() - before
        fill(cache, tokens - prefill_chunk - 1, chunk=prefill_chunk)
        filled = peak_bytes() - before
        model(random_ids(1, prefill_chunk), past_key_values=cache, use_cache=True)
        model(random_ids(1, 1), past_key_values=cache, use_cache=True)
        peak = peak_bytes() - before
        resident = settled_bytes() - before
    assert cache.tokens_held == [tokens]
    planned = plan.cache + plan.scratch
    return {
        "shape": SHAPE,
        "layers": layers,
        "tokens": tokens,
        "bits": bits,
        "prefill_chunk": prefill_chunk,
        "planned_cache": plan.cache,
        "planned_scratch": plan.scratch,
        "peak": peak,
        "peak_of_filling": filled,
        "resident_when_made": allocated,
        "resident_at_end": resident,
        "allocated_bytes": cache.allocated_bytes,
        "held_bytes": cache.held_bytes,
        "bf16_bytes": cache.bf16_bytes,
        "times_smaller": cache.bf16_bytes / cache.allocated_bytes,
        "peak_over_plan": peak / planned,
        "met": abs(peak / planned - 1) <= BAR,
    }


def fill(cache: PackedCache, tokens: int, *, chunk: int) -> None:
    """Bring every layer to ``tokens`` tokens, a chunk of all layers at a time."""
    key = next(packed_layers(cache)).codec.parameters.key
    keys, values = random_states(key, chunk, seed=0)
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        for layer in packed_layers(cache):
            layer.append(keys[:, :, :count], values[:, :, :count])
            layer.end_reading()


def main() -> int:
    """Measure each width, write the file, print the table; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=[2, 3, 4])
    parser.add_argument("--prefill-chunk", type=int, default=512)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_CSV)
    options = parser.parse_args()

    if options.here:
        with torch.inference_mode():
            measured = measure(
                tokens=options.tokens,
                layers=options.layers,
                bits=options.bits[0],
                prefill_chunk=options.prefill_chunk,
            )
        print(json.dumps(measured))
        return 0

    where = machine()
    rows = []
    for bits in options.bits:
        sizes = {"tokens": options.tokens, "layers": options.layers, "bits": bits}
        sizes["prefill-chunk"] = options.prefill_chunk
        arguments = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
        rows.append(in_own_process(Path(__file__), ["--here", *arguments]))
        write_csv(options.output, [row | {"bar": BAR} | where for row in rows])
    print(f"{options.tokens:,} tokens in {options.layers} layers; {SHAPE}; MiB")
    layout = "{:>4} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>10}  {}"
    print(
        layout.format(
            "bits", "cache", "scratch", "plan", "peak", "resident", "16 bit", "peak/plan", ""
        )
    )
    for row in rows:
        planned = row["planned_cache"] + row["planned_scratch"]
        sizes = (
            *(row["planned_cache"], row["planned_scratch"], planned),
            *(row["peak"], row["resident_at_end"], row["bf16_bytes"]),
        )
        print(
            layout.format(
                row["bits"],
                *(f"{size / 2**20:.1f}" for size in sizes),
                f"{row['peak_over_plan']:.3f}",
                "met" if row["met"] else "MISSED",
            )
        )
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
