"""What quantization costs, method against method, on the same windows under the evaluation rule.

    python benchmarks/accuracy.py --model DIR --dataset dev -o benchmarks/results/accuracy-dev.csv

Choices are made on ``dev``; ``test`` (WikiText-2) is run for tables. Three files are written: rows
(the name given), paired comparisons (``-comparisons``) and the demonstration with widened channels
(``-rescale``). The model runs in f32, so that differences are the cache's alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accuracy_variants import (
    GARBAGE,
    Baseline,
    Comparison,
    baselines,
    choices,
    comparisons,
    configs,
    garbage,
    ours,
)
from results_csv import PlainProgress, provenance, write_csv
from shared_measurement import calibrate_all
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.data import load_text, token_windows
from kvq_evaluation.caches import sidecar_bits
from kvq_evaluation.perplexity import UNQUANTIZED, Variant, evaluate
from kvq_evaluation.report import EvaluationRow, table, with_error
from kvq_evaluation.rescale import outlier_channels
from kvq_evaluation.statistics import paired_difference
from kvq_formats.config import KVQConfig
from kvq_formats.errors import KVQError
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_runtime.attach import attach
from kvq_runtime.evaluation_rule import attach_codec
from kvq_runtime.models import load_model, quantized_layers, resolve_model

DATASETS = {"dev": "builtin:dev", "test": "builtin"}
F32_BITS = 32.0


@dataclass(frozen=True)
class Setting:
    """What all runs share: model, text to calibrate on, text to evaluate on (int64 ``[S, T]``)."""

    model: PreTrainedModel
    record: BaseModelRecord
    calibration: CalibrationRecord
    calibration_windows: Tensor
    windows: Tensor
    dataset: str
    windows_available: int


def measure(
    setting: Setting,
    named: Mapping[str, KVQConfig],
    uncalibrated: Mapping[str, Baseline],
    *,
    garbage_of: str | None = None,
) -> list[EvaluationRow]:
    """Calibrate and evaluate on the setting's model as it is now; the unquantized row first."""
    progress = PlainProgress()
    sidecars = calibrate_all(
        setting.model,
        setting.calibration_windows,
        named,
        base_model=setting.record,
        calibration=setting.calibration,
        progress=progress,
    )
    if garbage_of is not None:
        sidecars[GARBAGE] = garbage(sidecars[garbage_of])
    variants: dict[str, Variant] = {
        name: partial(attach, setting.model, sidecar, rule="evaluation")
        for name, sidecar in sidecars.items()
    }
    variants |= {
        name: partial(attach_codec, setting.model, codec) for name, codec in uncalibrated.items()
    }
    measured = evaluate(setting.model, setting.windows, variants=variants, progress=progress)
    tokens = setting.windows.shape[1]
    shape = setting.record.fingerprint
    bits = {UNQUANTIZED: (F32_BITS, F32_BITS)}
    bits |= {name: sidecar_bits(sidecar, tokens=tokens) for name, sidecar in sidecars.items()}
    for name, codec in uncalibrated.items():
        # These methods have no pages, so nothing is unfinished.
        counted = codec.effective_bits(shape.num_kv_heads, shape.head_dim, tokens=tokens)
        bits[name] = (counted, counted)
    return [
        EvaluationRow.from_metrics(
            metrics,
            reference=measured[0],
            dataset=setting.dataset,
            effective_bits=bits[metrics.name][0],
            effective_bits_total=bits[metrics.name][1],
            windows_available=setting.windows_available,
        )
        for metrics in measured
    ]


def compare(rows: Mapping[str, EvaluationRow], pairs: list[Comparison]) -> list[dict[str, object]]:
    """Each pair with its paired standard error, and whether a bar is met."""
    records: list[dict[str, object]] = []
    for pair in pairs:
        a, b = rows[pair.variant], rows[pair.other]
        assert a.metrics is not None
        assert b.metrics is not None
        difference = paired_difference(a.metrics, b.metrics, factor=pair.factor)
        verdict = "no difference"
        if difference.counts:
            verdict = "lower" if difference.mean < 0 else "higher"
        met = verdict == "lower" and a.effective_bits <= b.effective_bits
        records.append(
            {
                "variant": pair.variant,
                "factor": pair.factor,
                "other": pair.other,
                "kl": a.kl,
                "kl_other": b.kl,
                "kl_ratio": a.kl / b.kl,
                "difference": difference.mean,
                "difference_stderr": difference.stderr,
                "verdict": verdict,
                "effective_bits": a.effective_bits,
                "effective_bits_other": b.effective_bits,
                "bar": pair.bar,
                "bar_met": ("yes" if met else "no") if pair.bar else "",
            }
        )
    return records


def rescale_demonstration(setting: Setting, bits: int) -> list[dict[str, object]]:
    """The same function with wider channels: what it does to codes a token and to ours."""
    layers = quantized_layers(setting.model.config)
    named = {ours(bits): configs(bits)[ours(bits)]}
    contexts: dict[str, AbstractContextManager[object]] = {
        "as trained": nullcontext(),
        "2 key pairs a head x8": outlier_channels(setting.model, key_pairs=2, value_channels=0),
        "2 key pairs and 1 value channel a head x8": outlier_channels(
            setting.model, key_pairs=2, value_channels=1
        ),
    }
    records: list[dict[str, object]] = []
    for weights, context in contexts.items():
        print(f"rescale: {weights}", file=sys.stderr)
        with context:
            rows = measure(setting, named, baselines(bits, layers))
        records.extend({"weights": weights, **plain(row)} for row in rows)
    return records


def plain(row: EvaluationRow) -> dict[str, object]:
    """A row's numbers without its windows."""
    return {name: value for name, value in row.to_json().items() if name != "per_window"}


def prepare(arguments: argparse.Namespace) -> Setting:
    """Load the model in f32 and cut both texts."""
    resolved = resolve_model(arguments.model)
    loaded = load_model(resolved, dtype="float32")
    dataset = DATASETS.get(arguments.dataset, arguments.dataset)
    cut = token_windows(
        loaded.tokenizer,
        load_text(dataset, purpose="eval"),
        num_windows=arguments.limit,
        seq_len=arguments.seq_len,
    )
    samples = token_windows(
        loaded.tokenizer,
        load_text("builtin", purpose="calibrate"),
        num_windows=arguments.num_samples,
        seq_len=arguments.seq_len,
    )
    calibration = CalibrationRecord(
        dataset=samples.name,
        revision=samples.revision,
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
        seed=0,
        token_sha256=samples.token_sha256,
    )
    return Setting(
        model=loaded.model,
        record=loaded.record,
        calibration=calibration,
        calibration_windows=samples.input_ids,
        windows=cut.input_ids,
        dataset=cut.name,
        windows_available=cut.windows_total,
    )


def main() -> None:
    """Run the tables and write them before anything is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--dataset", default="dev", help="dev, test, or what kvq eval --ppl takes")
    parser.add_argument("--limit", type=int, help="windows [all]")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a window [1024]")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration windows [16]")
    parser.add_argument("--bits", default="2,3,4", help="widths [2,3,4]")
    parser.add_argument("--no-choices", action="store_true", help="only the ladder and the bars")
    parser.add_argument("--rescale-bits", type=int, default=3, help="width of the demonstration")
    parser.add_argument("--rescale-windows", type=int, default=16, help="of them, at most [16]")
    parser.add_argument("--no-rescale", action="store_true", help="leave the demonstration out")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        run(arguments)
    except KVQError as error:
        sys.exit(f"Error: {error}" + (f"\nHint: {error.hint}" if error.hint else ""))


def run(arguments: argparse.Namespace) -> None:
    """The tables of the widths asked for, then the demonstration."""
    setting = prepare(arguments)
    origin = provenance(setting.model, name=setting.record.name, seq_len=arguments.seq_len)
    widths = [int(width) for width in arguments.bits.split(",")]
    layers = quantized_layers(setting.model.config)
    named: dict[str, KVQConfig] = {}
    uncalibrated: dict[str, Baseline] = {}
    pairs: list[Comparison] = []
    for bits in widths:
        named |= configs(bits)
        uncalibrated |= baselines(bits, layers)
        pairs += comparisons(bits)
        if not arguments.no_choices:
            named |= {name: config for name, (_, config) in choices(bits).items()}
            pairs += [Comparison(name, other) for name, (other, _) in choices(bits).items()]
    rows = measure(setting, named, uncalibrated, garbage_of=ours(widths[0]))
    compared = compare({row.name: row for row in rows}, pairs)
    output: Path = arguments.output
    write_csv(output, [origin | plain(row) for row in rows])
    write_csv(_beside(output, "comparisons"), [origin | record for record in compared])
    print_rows(rows)
    for record in compared:
        print(
            f"{record['variant']} : {record['factor']} x {record['other']}: "
            f"{record['difference']:+.5f} ± {record['difference_stderr'] or 0:.5f} "
            f"{record['verdict']} {record['bar']} {record['bar_met']}"
        )
    if not arguments.no_rescale:
        few = replace(setting, windows=setting.windows[: arguments.rescale_windows])
        demonstrated = rescale_demonstration(few, arguments.rescale_bits)
        write_csv(_beside(output, "rescale"), [origin | record for record in demonstrated])
        for record in demonstrated:
            kl = with_error(record["kl"], record["kl_stderr"], digits=5)  # type: ignore[arg-type]
            print(f"{record['weights']:<44} {record['name']:<28} KL {kl}")


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


def print_rows(rows: list[EvaluationRow]) -> None:
    """The table in plain columns."""
    drawn = table(rows)
    print(drawn.caption)
    for cells in (drawn.headers, *drawn.rows):
        print(f"{cells[0]:<30}" + "  ".join(f"{cell:>18}" for cell in cells[1:]))


if __name__ == "__main__":
    main()
