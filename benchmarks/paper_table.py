"""The paper's main table for one model: perplexity on WikiText-2, its cache at 16, 4, 3 and 2 bits.

    python benchmarks/paper_table.py --model meta-llama/Llama-2-7b-hf
    make bench-paper MODEL=meta-llama/Llama-2-7b-hf

The protocol is that of Table 18 (see ``paper_protocol``, which says where it agrees with the
paper's and GPTQ's code and where it does not): fp16, windows of the model's own context, stride as
long, one sink token, 16 x 2,048 tokens of the training split to calibrate on. Each row also has its
KL to the unquantized model, top-1 agreement and effective bits, and, for models of the table, the
published figure. Each is written to ``benchmarks/results/paper-table-MODEL.csv`` as soon as it is
measured and not measured again: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import paper_protocol as protocol
import torch
from paper_plan import Plan, Row, make_plan, read_text
from paper_protocol import Published
from paper_results import ResultFile, print_table
from results_csv import REPOSITORY, PlainProgress, plain, processor, provenance

from kvq_calibration.pipeline import calibrate
from kvq_evaluation.caches import evaluate_caches
from kvq_evaluation.report import EvaluationRow
from kvq_formats.config import KVQConfig
from kvq_formats.errors import KVQError
from kvq_formats.records import CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.models import DTYPES, LoadedModel, load_model, load_tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Measure the rows that are not in the file yet, one by one, then print all of them."""
    plan = make_plan(arguments)
    for note in plan.notes:
        print(f"Note: {note}", file=sys.stderr)
    output = arguments.output or (
        REPOSITORY / "benchmarks" / "results" / f"paper-table-{plan.model.record.name}.csv"
    )
    results = ResultFile(output)
    identities = [plan.identity(row) for row in plan.rows]
    if arguments.overwrite:
        results.forget(identities)
    pending = [row for row in plan.rows if not results.has(plan.identity(row))]
    kept = len(plan.rows) - len(pending)
    if kept:
        print(f"Note: {kept} row(s) of {output} are kept; --overwrite", file=sys.stderr)
    if pending:
        _measure(plan, pending, results, arguments)
    print_table([results.find(identity) for identity in identities])


def _measure(
    plan: Plan, pending: Sequence[Row], results: ResultFile, arguments: argparse.Namespace
) -> None:
    # The text comes first: too little of it is found out before weights are loaded.
    quantizes = any(row.bits is not None for row in pending)
    samples = _samples(plan, arguments) if quantizes else None
    loaded = load_model(
        plan.model,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        attn_implementation=arguments.attn_implementation,
    )
    origin = _origin(loaded, plan)
    results.check_weights(plan.settings, str(origin["weights"]))
    for row in pending:
        sidecars = {}
        if row.bits is not None:
            assert samples is not None
            sidecars[row.name] = calibrate(
                loaded.model,
                samples[0],
                row.config(sink_tokens=arguments.sink_tokens, qnorm=arguments.qnorm),
                base_model=loaded.record,
                calibration=samples[1],
                progress=PlainProgress(),
            )
        results.add(_evaluated(plan, row, loaded, sidecars, origin))


def _samples(plan: Plan, arguments: argparse.Namespace) -> tuple[torch.Tensor, CalibrationRecord]:
    """Calibration samples int64 ``[S, T]``, and what sidecars say of them."""
    source = read_text(arguments.calibration_dataset, purpose="calibrate")
    samples = protocol.draw_samples(
        protocol.text_ids(load_tokenizer(plan.model), source),
        num_samples=arguments.num_samples,
        seq_len=arguments.sample_tokens,
        seed=arguments.seed,
    )
    return samples, CalibrationRecord(
        dataset=source.name,
        revision=source.revision,
        num_samples=arguments.num_samples,
        seq_len=arguments.sample_tokens,
        seed=arguments.seed,
        token_sha256=protocol.sha256_of(samples),
    )


def _origin(loaded: LoadedModel, plan: Plan) -> dict[str, object]:
    """Weights, device, versions and commit."""
    seq_len = plan.windows.input_ids.shape[1]
    origin = provenance(loaded.model, name=loaded.record.name, seq_len=seq_len)
    if torch.cuda.is_available() and origin["device"] != "cpu":
        return origin | {"device": torch.cuda.get_device_name()}
    return origin | {"device": processor()}


def _evaluated(
    plan: Plan,
    row: Row,
    loaded: LoadedModel,
    sidecars: dict[str, Sidecar],
    origin: dict[str, object],
) -> dict[str, object]:
    """A row of the file."""
    *_, measured = evaluate_caches(
        loaded.model,
        plan.windows.input_ids,
        sidecars,
        dataset=plan.text.name,
        windows_available=plan.windows.available,
        scored=plan.windows.scored,
        progress=PlainProgress(),
    )
    assert measured.name == row.name
    return {
        **origin,
        **plan.identity(row),
        **plain(measured),
        **_beside(measured, row, plan.published),
    }


def _beside(measured: EvaluationRow, row: Row, published: Published | None) -> dict[str, object]:
    """The published figure, how far ours is from it, and what it says that the cache costs."""
    figure = published.perplexity.get((row.bits, row.outlier_fraction)) if published else None
    if published is None or figure is None:
        return dict.fromkeys(("published_model", "published", "difference", "published_increase"))
    return {
        "published_model": published.name,
        "published": figure,
        "difference": measured.perplexity - figure,
        "published_increase": figure - published.perplexity[None, 0],
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its defaults are the paper's protocol."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder, or Hub id: org/name, org/name@revision")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--dtype", choices=DTYPES, default="float16", help="type of the weights [float16]")
    add("--device-map", help="auto, cpu, cuda:1, ... [one GPU if there is one, else CPU]")
    add("--attn-implementation", help="eager, sdpa, ... [the model's own]")
    add("--bits", default="16,4,3,2", help="widths; 16 is the unquantized model [16,4,3,2]")
    add("--outlier-fraction", default="0,0.01", help="of every width below 16 [0,0.01]")
    add("--context", type=int, help="tokens a window [the paper's; else positions, at most 8192]")
    add("--stride", type=int, help="tokens between windows' beginnings [the context]")
    add("--sink-tokens", type=int, default=protocol.SINK_TOKENS, help="exact ones a window [1]")
    add("--qnorm", action=argparse.BooleanOptionalAction, default=KVQConfig().qnorm, help="Q-Norm")
    add("--dataset", default=protocol.DATASET, help="text to evaluate on [wikitext2]")
    add("--limit", type=int, help="windows, evenly spread; the result is partial [all]")
    add("--calibration-dataset", default=protocol.DATASET, help="its training split [wikitext2]")
    add("--num-samples", type=int, default=protocol.NUM_SAMPLES, help="samples [16]")
    add("--sample-tokens", type=int, default=protocol.SAMPLE_TOKENS, help="tokens of each [2048]")
    add("--seed", type=int, default=protocol.SEED, help="draws the samples [0]")
    add("--published", default="auto", help="column of the paper, none, or auto: by the shape")
    add("--overwrite", action="store_true", help="measure again what the file has")
    add("-o", "--output", type=Path, help="CSV [benchmarks/results/paper-table-MODEL.csv]")
    return parser.parse_args(argv)


def main() -> None:
    """Run; errors that a user can mend are said without a traceback."""
    torch.manual_seed(0)
    try:
        run(parse())
    except KVQError as error:
        sys.exit(f"Error: {error}" + (f"\nHint: {error.hint}" if error.hint else ""))


if __name__ == "__main__":
    main()
