#!/usr/bin/env python3
"""Decoding on a CPU: kvq's packed cache, transformers' quantized caches, and no quantization.

    pip install optimum-quanto hqq      # the backends of transformers' QuantizedCache
    python benchmarks/decode_cpu.py [--context 4096] [--rounds 5] [--dtype float32] [-o CSV]

A random model with the attention of Llama-3-8B and little else decodes the same tokens on each
cache, one after another in rounds, so that a busy machine slows all of them. With 5 rounds of 32
tokens every quantizing cache packs what is recent once: transformers' quantize the whole cache anew
each 128 tokens, kvq one page each 256. ``mean`` contains that, ``median`` does not. Memory is
measured apart, in a process for each cache, as growth of the resident set. A backend that is not
installed is left out, and said so. Exit code 1 if kvq is slower than one at the same bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from process_memory import in_own_process, peak_bytes, reset_peak, settled_bytes
from random_llama import SHAPE, calibrated, random_ids, random_llama
from results_csv import PlainProgress, machine, write_csv
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache
from transformers.cache_utils import Cache

import kvq
from kvq_runtime.cache import PackedCache

DEFAULT_CSV = Path(__file__).resolve().parent / "results" / "decode-cpu.csv"
UNQUANTIZED = "unquantized"
INSTALL = "pip install optimum-quanto hqq"
NAMES = {
    UNQUANTIZED: 0,
    "kvq 2": 2,
    "kvq 3": 3,
    "kvq 4": 4,
    "quanto 2": 2,
    "quanto 4": 4,
    "hqq 2": 2,
    "hqq 3": 3,
    "hqq 4": 4,
    "fp8": 8,
}
"""Caches, and bits of their codes; fp8 is a side figure, no kvq cache has 8 bits."""


@dataclass
class Contestant:
    """One cache and what it took.

    Fields:
        attached: makes the context that the model decodes in.
        cache: empty at first.
        rounds: seconds of each token, a list a round.
        prefill: seconds.
    """

    name: str
    attached: Callable[[], AbstractContextManager[object]]
    cache: Cache
    rounds: list[list[float]] = field(default_factory=list)
    prefill: float = 0.0


def contestant(name: str, model: LlamaForCausalLM) -> Contestant:
    """Make an empty cache by its name; raises ImportError without its backend."""
    if name == UNQUANTIZED:
        return Contestant(name, nullcontext, DynamicCache(config=model.config))
    if name.startswith("kvq"):
        sidecar = calibrated(model, bits=NAMES[name])
        return Contestant(name, lambda: kvq.attach(model, sidecar), PackedCache(model, sidecar))
    backend = name.split()[0]
    bits = None if backend == "fp8" else NAMES[name]
    return Contestant(name, nullcontext, QuantizedCache(backend, model.config, nbits=bits))


def prefill(model: LlamaForCausalLM, cache: Cache, ids: Tensor) -> None:
    """Feed a prompt, int64 ``[1, T]``, in one piece."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def decode(model: LlamaForCausalLM, cache: Cache, ids: Tensor) -> list[float]:
    """Feed int64 ``[1, T]`` token by token; seconds of each."""
    seconds = []
    for token in ids.split(1, dim=1):
        begun = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - begun)
    return seconds


def race(
    model: LlamaForCausalLM,
    contestants: Sequence[Contestant],
    *,
    context: int,
    rounds: int,
    tokens: int,
) -> None:
    """Fill every cache, then let them decode in turn."""
    ids = random_ids(1, context + rounds * tokens)
    progress = PlainProgress()
    with progress.stage("prefill", len(contestants)) as done:
        for one in contestants:
            # What a library compiles or allocates when it is used first is nobody's decoding.
            warm = contestant(one.name, model)
            with one.attached():
                prefill(model, warm.cache, ids[:, :64])
                decode(model, warm.cache, ids[:, 64:68])
                begun = time.perf_counter()
                prefill(model, one.cache, ids[:, :context])
                one.prefill = time.perf_counter() - begun
            del warm
            done()
    with progress.stage("decode", rounds * len(contestants)) as done:
        for number in range(rounds):
            first = context + number * tokens
            turn = number % len(contestants)
            for one in [*contestants[turn:], *contestants[:turn]]:
                with one.attached():
                    one.rounds.append(decode(model, one.cache, ids[:, first : first + tokens]))
                done()


def timings(contestants: Sequence[Contestant]) -> dict[str, dict[str, object]]:
    """Columns of each cache's times, by name; ratios of its time to that of others."""
    by_name = {one.name: one for one in contestants}

    def ratio(one: Contestant, other: Contestant | None, take: Callable[..., float]) -> object:
        """Median over rounds: both of a round lie in the same seconds."""
        if other is None or other is one:
            return ""
        pairs = zip(one.rounds, other.rounds, strict=True)
        return statistics.median(take(a) / take(b) for a, b in pairs)

    columns = {}
    for one in contestants:
        every = [second for part in one.rounds for second in part]
        same_bits = by_name.get(f"kvq {NAMES[one.name]}")
        # Time is theirs over ours: above 1 where kvq is faster.
        columns[one.name] = {
            "mean_ms": 1e3 * statistics.fmean(every),
            "median_ms": 1e3 * statistics.median(every),
            "slowest_ms": 1e3 * max(every),
            "tokens_per_s": 1 / statistics.fmean(every),
            "prefill_s": one.prefill,
            "times_unquantized": ratio(one, by_name.get(UNQUANTIZED), statistics.median),
            "times_kvq_same_bits": ratio(one, same_bits, statistics.median),
            "times_kvq_same_bits_mean": ""
            if same_bits in (None, one)
            else statistics.fmean(every)
            / statistics.fmean([s for part in same_bits.rounds for s in part]),
        }
    return columns


def memory(name: str, model: LlamaForCausalLM, *, context: int, tokens: int) -> dict[str, object]:
    """Columns of one cache's memory in this process, bytes."""
    ids = random_ids(1, context + tokens)
    one = contestant(name, model)
    warm = contestant(name, model)
    with one.attached():
        prefill(model, warm.cache, ids[:, :64])
        decode(model, warm.cache, ids[:, 64:68])
        del warm
        before = settled_bytes()
        reset_peak()
        prefill(model, one.cache, ids[:, :context])
        peak_of_prefill = peak_bytes() - before
        held = settled_bytes() - before
        # Where the system cannot, the peak of decoding contains that of the prompt.
        is_reset = reset_peak()
        decode(model, one.cache, ids[:, context:])
        peak = peak_bytes() - before
    return {
        "peak_prefill": peak_of_prefill,
        "held": held,
        "peak_decode": peak if is_reset else "",
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens a round")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--memory-of", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_CSV)
    return parser.parse_args()


def main() -> int:
    """Measure, write the file, print the table; 1 if kvq is slower at the same bits."""
    options = arguments()
    tokens = options.rounds * options.tokens
    model = random_llama(
        layers=options.layers,
        positions=options.context + tokens,
        dtype=getattr(torch, options.dtype),
    )
    if options.memory_of:
        with torch.inference_mode():
            found = memory(options.memory_of, model, context=options.context, tokens=tokens)
        print(json.dumps(found))
        return 0

    where = machine()
    contestants = []
    for name in options.only:
        try:
            contestants.append(contestant(name, model))
        except ImportError as error:
            print(f"{name}: left out, {error} ({INSTALL})", file=sys.stderr)
    with torch.inference_mode():
        race(
            model,
            contestants,
            context=options.context,
            rounds=options.rounds,
            tokens=options.tokens,
        )
    columns = timings(contestants)
    common = {
        "shape": SHAPE,
        "layers": options.layers,
        "dtype": options.dtype,
        "context": options.context,
        "tokens": tokens,
    }
    rows = []
    for name, timed in columns.items():
        sizes = {"context": options.context, "layers": options.layers, "rounds": options.rounds}
        flags = [part for key, size in sizes.items() for part in (f"--{key}", str(size))]
        flags += ["--tokens", str(options.tokens), "--dtype", options.dtype, "--memory-of", name]
        found = in_own_process(Path(__file__), flags)
        rows.append({"cache": name, "bits": NAMES[name]} | common | timed | found | where)
        # On disk before anything is drawn, and after each cache.
        write_csv(options.output, rows)
    show(rows)
    columns_of_bar = ("times_kvq_same_bits", "times_kvq_same_bits_mean")
    ratios = [row[name] for row in rows for name in columns_of_bar if row[name] != ""]
    return 0 if all(ratio > 1 for ratio in ratios) else 1


def show(rows: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    first = rows[0]
    print(
        f"{first['context']:,} tokens of context, {first['layers']} layers of {first['shape']}, "
        f"{first['dtype']}; ms a token, MiB"
    )
    layout = "{:<12} {:>8} {:>8} {:>9} {:>11} {:>9} {:>8} {:>8} {:>8}"
    print(
        layout.format(
            *("cache", "median", "mean", "slowest", "x unquant.", "x kvq", "held", "peak"),
            "prefill",
        )
    )
    for row in rows:
        times = (f"{row[k]:.1f}" for k in ("median_ms", "mean_ms", "slowest_ms"))
        ratios = (
            f"{row[k]:.2f}" if row[k] != "" else ""
            for k in ("times_unquantized", "times_kvq_same_bits")
        )
        sizes = (
            f"{row[k] / 2**20:.0f}" if row[k] != "" else ""
            for k in ("held", "peak_decode", "peak_prefill")
        )
        print(layout.format(row["cache"], *times, *ratios, *sizes))


if __name__ == "__main__":
    sys.exit(main())
