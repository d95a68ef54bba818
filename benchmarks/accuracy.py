"""What quantization costs, method against method: the tables and the plot of ``docs/accuracy.md``.

    python benchmarks/accuracy.py

Three models: the embedded one, the same with channels made eight times wider without changing
what it computes, and a small Qwen3 with heads of 128 numbers. Every cache sees the same windows of
WikiText-2 test under the evaluation rule, and the first of them under the runtime rule; ours token
by token through the packed cache. Models run in f32, so that differences are the cache's alone.
Rows go to ``benchmarks/results/accuracy-MODEL.csv``; the page and its plot are drawn from them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accuracy_models import SEQ_LEN, calibration_text, open_model, run_each

RESULTS = Path(__file__).resolve().parent / "results"

MODELS = ("tiny-qwen3", "tiny-llama", "tiny-llama-outliers")
"""Each is measured by a process of its own, the slowest first."""

WINDOWS, DECODED_WINDOWS = 10, 4


def measure(name: str, *, dataset: str, windows: int, decoded: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    from accuracy_caches import GARBAGE, STEPPED, TOKEN_BY_TOKEN
    from accuracy_garbage import garbage
    from accuracy_one_forward import as_codecs
    from results_csv import PlainProgress, provenance

    from kvq_calibration.data import load_text, token_windows
    from kvq_evaluation.caches import evaluate_caches

    progress = PlainProgress()
    rows: list[Any] = []
    with open_model(name) as loaded:
        text = load_text(dataset, purpose="eval")
        cut = token_windows(loaded.tokenizer, text, num_windows=windows, seq_len=SEQ_LEN)
        origin = provenance(loaded.model, name=name, seq_len=SEQ_LEN)
        evaluate = partial(
            evaluate_caches,
            loaded.model,
            dataset=cut.name,
            windows_available=cut.windows_total,
            progress=progress,
        )
        sidecars, baselines = _caches(loaded, progress)
        first = next(iter(sidecars.values()))
        sidecars[GARBAGE] = garbage(first)
        for path, used in (("prefill", windows), ("decode", decoded)):
            # In one forward on both paths, ours and the others; token by token is checked below.
            rows += evaluate(
                cut.input_ids[:used], {}, {**as_codecs(sidecars), **baselines}, path=path
            )
        stepped = {f"{STEPPED} @ 0": sidecars[f"{STEPPED} @ 0"]}
        rows += evaluate(cut.input_ids[:1], stepped, {}, path="decode")[1:]
        flat = [{**origin, **_plain(row), **_paper_bits(row, baselines, first)} for row in rows]
    flat[-1]["name"] = TOKEN_BY_TOKEN
    return flat


def _caches(loaded: Any, progress: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sidecars and baselines by name; ``name @ seed`` where there are several seeds."""
    from accuracy_caches import RIVALS, SEEDED, SEEDS, ours
    from shared_measurement import calibrate_all

    from kvq_evaluation.baselines.named import BaselineName
    from kvq_evaluation.samples import collect_samples
    from kvq_runtime.models import quantized_layers

    sidecars: dict[str, Any] = {}
    baselines: dict[str, Any] = {}
    layers = quantized_layers(loaded.model.config)
    for place, seed in enumerate(SEEDS):
        windows, record = calibration_text(loaded, seed)
        wanted = [one for one in ours() if place < one.seeds]
        made = calibrate_all(
            loaded.model,
            windows,
            {one.name: one.config for one in wanted},
            average_bits={o.name: o.average_bits for o in wanted if o.average_bits is not None},
            base_model=loaded.record,
            calibration=record,
            progress=progress,
        )
        sidecars |= {f"{one} @ {seed}": sidecar for one, sidecar in made.items()}
        asked = [
            BaselineName.parse(one)
            for settings in RIVALS.values()
            for one in settings
            if place == 0 or one.rstrip("234") in SEEDED
        ]
        learned = collect_samples(loaded.model, windows)
        for one in asked:
            baselines[f"{one.name} @ {seed}"] = one.make(
                layers=layers, samples=lambda learned=learned: learned, sink_tokens=1
            )
    return sidecars, baselines


def _paper_bits(row: Any, baselines: dict[str, Any], sidecar: Any) -> dict[str, Any]:
    """Bits of KVQuant as its paper counts them; empty for every other cache."""
    from kvq_evaluation.baselines.kvquant import KVQuant

    codec = baselines.get(row.name)
    if not isinstance(codec, KVQuant):
        return {"paper_bits": None}
    shape = sidecar.base_model.fingerprint
    counted = replace(codec, storage="paper")
    return {
        "paper_bits": counted.effective_bits(shape.num_kv_heads, shape.head_dim, tokens=SEQ_LEN)
    }


def _plain(row: Any) -> dict[str, Any]:
    """A row's numbers, its name and seed apart; what windows summed to in one cell each."""
    name, _, seed = row.name.partition(" @ ")
    from results_csv import plain

    errors = list(row.attention_error.values())
    return {
        **plain(row),
        "name": name,
        "seed": seed,
        "attention_error": sum(errors) / len(errors) if errors else None,
        "attention_error_by_layer": " ".join(f"{error:.4g}" for error in errors),
        "window_kl": " ".join(f"{kl:.6g}" for kl in row.metrics.kl.tolist()),
    }


def main() -> None:
    """Measure the models, two at a time, and draw the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="one of them [all]")
    parser.add_argument("--dataset", default="builtin", help="builtin (WikiText-2 test)")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--decoded-windows", type=int, default=DECODED_WINDOWS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--here", action="store_true", help="measure in this process; no page")
    arguments = parser.parse_args()
    models = arguments.model or list(MODELS)
    if arguments.here:
        from results_csv import write_csv

        for name in models:
            rows = measure(
                name,
                dataset=arguments.dataset,
                windows=arguments.windows,
                decoded=arguments.decoded_windows,
            )
            write_csv(arguments.output / f"accuracy-{name}.csv", rows)
        return
    begun = time.monotonic()
    options = [
        "--dataset", arguments.dataset, "--windows", str(arguments.windows),
        "--decoded-windows", str(arguments.decoded_windows), "-o", str(arguments.output),
    ]  # fmt: skip
    run_each(__file__, models, options, processes=arguments.processes)
    print(f"measured in {(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)
    from accuracy_page import write_page

    write_page(arguments.output)


if __name__ == "__main__":
    main()
