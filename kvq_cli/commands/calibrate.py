"""``kvq calibrate``: measure a model on text and write its sidecar."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvq_cli.options import (
    DATA,
    OUTPUT,
    QUANTIZATION,
    AsJson,
    AttnImplementation,
    BatchSize,
    Bits,
    DeviceMap,
    Dtype,
    DtypeOption,
    LoadIn4bit,
    LoadIn8bit,
    ModelAlias,
    NoProgress,
    Overwrite,
    Quiet,
    Revision,
    Seed,
    Sensitivity,
    Solver,
    TextColumn,
    TrustRemoteCode,
    ValueGrain,
    Verbose,
    chosen_load_in,
    chosen_model,
    is_given,
    model_argument,
    option,
    refuse_together,
)
from kvq_cli.output import Output

SCHEMA = "kvq.calibrate/1"


def calibrate(
    context: typer.Context,
    model: Annotated[
        str | None,
        model_argument(
            help="Hub id (org/name, org/name@revision) or folder. Without it: the built-in model."
        ),
    ] = None,
    model_alias: ModelAlias = None,
    revision: Revision = None,
    dtype: DtypeOption = Dtype.AUTO,
    device_map: DeviceMap = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    attn_implementation: AttnImplementation = None,
    trust_remote_code: TrustRemoteCode = False,
    bits: Bits = 4,
    key_bits: Annotated[
        int | None,
        option("--key-bits", panel=QUANTIZATION, help="Bits of a key's code.", default="--bits"),
    ] = None,
    value_bits: Annotated[
        int | None,
        option(
            "--value-bits", panel=QUANTIZATION, help="Bits of a value's code.", default="--bits"
        ),
    ] = None,
    average_bits: Annotated[
        float | None,
        option(
            "--average-bits",
            panel=QUANTIZATION,
            metavar="X",
            help="Choose 2, 3 or 4 bits for each layer's keys and values, X on average.",
            default="--bits for all",
        ),
    ] = None,
    outlier_fraction: Annotated[
        float,
        option(
            "--outlier-fraction",
            panel=QUANTIZATION,
            help="Share of entries that the thresholds leave outside, 0 to 0.2; 0: none.",
        ),
    ] = 0.01,
    range_margin: Annotated[
        float,
        option(
            "--range-margin",
            panel=QUANTIZATION,
            help="Widen the range of key channels for text unlike the calibration's, 1 to 2.",
        ),
    ] = 1.2,
    outlier_capacity: Annotated[
        float,
        option(
            "--outlier-capacity",
            panel=QUANTIZATION,
            help="Room for key outliers, as a share of a page's entries, 0 to 0.2.",
        ),
    ] = 0.01,
    sink_tokens: Annotated[
        int,
        option(
            "--sink-tokens",
            panel=QUANTIZATION,
            help="First tokens of a text that stay unquantized, 0 to 1024.",
        ),
    ] = 1,
    recent_tokens: Annotated[
        int,
        option(
            "--recent-tokens",
            panel=QUANTIZATION,
            help="Newest tokens that stay unquantized, 0 to 65536.",
        ),
    ] = 0,
    value_grain: Annotated[
        ValueGrain,
        option(
            "--value-grain",
            panel=QUANTIZATION,
            help="What shares a value scale: a token's vector over all heads, or over one head.",
        ),
    ] = ValueGrain.TOKEN,
    sensitivity: Annotated[
        Sensitivity,
        option(
            "--sensitivity",
            panel=QUANTIZATION,
            help="Weight of a point in the codebook fit: squared gradient of the loss, or 1.",
        ),
    ] = Sensitivity.FISHER,
    kmeans: Annotated[
        Solver,
        option("--kmeans", panel=QUANTIZATION, help="Solver of the codebook fit."),
    ] = Solver.EXACT,
    qnorm: Annotated[
        bool,
        option(
            "--qnorm/--no-qnorm",
            panel=QUANTIZATION,
            help="Match mean and deviation of decoded numbers.",
        ),
    ] = True,
    feedback: Annotated[
        bool,
        option(
            "--feedback/--no-feedback",
            panel=QUANTIZATION,
            help="Make rounding errors good in other channels; needs --sensitivity fisher.",
        ),
    ] = True,
    dataset: Annotated[
        str,
        option(
            "--dataset",
            panel=DATA,
            metavar="NAME",
            help="builtin, wikitext2, c4, a Hub id, or a .txt, .jsonl or .parquet file.",
        ),
    ] = "builtin",
    split: Annotated[
        str | None,
        option("--split", panel=DATA, help="Split of a Hub data set.", default="train"),
    ] = None,
    text_column: TextColumn = None,
    num_samples: Annotated[
        int, option("--num-samples", panel=DATA, help="Windows of text.", min=1)
    ] = 16,
    seq_len: Annotated[
        int,
        option(
            "--seq-len", panel=DATA, help="Tokens a window; at most the model's positions.", min=2
        ),
    ] = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    destination: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            panel=OUTPUT,
            metavar="DIR",
            help="Folder of the sidecar.",
            default="./<model name>-kvq<bits>",
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        option("--dry-run", panel=OUTPUT, help="Check everything, say what would be done, stop."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Measure a model on text and write its sidecar.

    A sidecar is what a quantized cache needs beside its model. Finds the range
    of every key channel and the sensitivity of every key and value, and fits
    one codebook for keys and one for values in each layer. The weights are not
    changed. The sidecar becomes the current one, which other commands use.

    [bold]Examples[/bold]
      kvq calibrate Qwen/Qwen3-0.6B --bits 3
      kvq calibrate ./my-model --bits 4 -o ./q4 --dataset ./my-text.txt
      kvq calibrate ./my-model --key-bits 2 --value-bits 3
      kvq calibrate ./my-model --average-bits 2.75
      kvq calibrate --dry-run
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    load_in = chosen_load_in(context, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    from kvq_calibration.plan import plan_calibration
    from kvq_cli.calibration import (
        default_folder,
        plan_facts,
        plan_json,
        quantization,
        run_plan,
    )
    from kvq_cli.calibration_memory import Loading, check_memory, say_memory
    from kvq_cli.output import facts
    from kvq_cli.session import remember
    from kvq_formats.sidecar import check_output_directory
    from kvq_runtime.models import resolve_model
    from kvq_runtime.weight_quantization import bitsandbytes_config

    if average_bits is not None:
        refuse_together(context, "average_bits", "bits", "key_bits", "value_bits")
    config = quantization(
        {
            "outlier_fraction": outlier_fraction,
            "range_margin": range_margin,
            "outlier_capacity": outlier_capacity,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "value_grain": value_grain.value,
            "qnorm": qnorm,
            "sensitivity": sensitivity.value,
            "kmeans": kmeans.value,
            "feedback": feedback if is_given(context, "feedback") else None,
        },
        bits=bits,
        key_bits=key_bits,
        value_bits=value_bits,
    )
    name = chosen_model(model, model_alias)
    if name is None:
        output.note("no MODEL is named: calibrating the small built-in model")
    resolved = resolve_model(name, revision=revision, trust_remote_code=trust_remote_code)
    # What cannot be is said before the text is looked for.
    bitsandbytes_config(resolved, load_in)
    folder = destination or default_folder(resolved.record.name, config, average_bits=average_bits)
    check_output_directory(folder, overwrite=overwrite)
    plan = plan_calibration(
        resolved,
        config=config,
        average_bits=average_bits,
        dataset=dataset,
        split=split,
        text_column=text_column,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
    )
    for line in plan.notes:
        output.note(line)
    loading = Loading(dtype.value, device_map, attn_implementation, load_in)
    memory = check_memory(plan, loading, batch_size=batch_size)
    if dry_run:
        output.result(
            {"schema": SCHEMA, **plan_json(plan, folder, memory)},
            facts(plan_facts(plan, folder, memory)),
        )
        return
    say_memory(output, memory)
    calibrated = run_plan(
        output,
        plan,
        folder,
        overwrite=overwrite,
        batch_size=batch_size,
        dtype=dtype.value,
        device_map=device_map,
        attn_implementation=attn_implementation,
        load_in=load_in,
    )
    remember(folder, output)
    following = shlex.join(["kvq", "eval", *([name] if name else []), "--sidecar", str(folder)])
    output.result(
        {"schema": SCHEMA, "dry_run": False, **calibrated.to_json(), "next": following},
        facts(calibrated.facts()),
    )
    output.next(following)
