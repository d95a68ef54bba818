"""``kvq demo``: the whole way on the built-in model, offline, in minutes."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvq_cli.options import (
    OUTPUT,
    AsJson,
    Bits,
    NoProgress,
    Overwrite,
    Quiet,
    Verbose,
    option,
)
from kvq_cli.output import Output

SCHEMA = "kvq.demo/1"

NUM_SAMPLES = 16
SEQ_LEN = 1024

# The demo's fixed subset: this many windows of each text, evenly spread, and the bundled texts
# themselves, so that a network changes nothing. The whole texts are what `kvq eval` reads.
WINDOWS = 32
# Within the positions of the model; seven pages are complete in the end.
PROMPT_TOKENS = 1600
NEW_TOKENS = 200
TEXTS = {"builtin": "WikiText-2 test (bundled)", "builtin:c4": "C4 (bundled)"}


def demo(
    context: typer.Context,
    bits: Bits = 3,
    destination: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            panel=OUTPUT,
            metavar="DIR",
            help="Keep the sidecar in this folder.",
            default="a temporary folder",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Calibrate and evaluate the built-in model and generate with it, offline.

    Needs no network and no GPU. Evaluates on a fixed subset of the test texts,
    so its tables are marked as partial, then continues one of them on a packed
    cache. The current sidecar stays what it was.

    [bold]Examples[/bold]
      kvq demo
      kvq demo --bits 2 -o ./demo-kvq2
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    from kvq_calibration.data import load_text, token_windows
    from kvq_calibration.plan import plan_calibration
    from kvq_cli.calibration import default_folder, quantization, run_plan
    from kvq_cli.demonstration import demonstrate
    from kvq_cli.measurement import cut_texts, measure, tables
    from kvq_cli.output import facts
    from kvq_cli.peak_memory import peak_memory, peak_memory_json
    from kvq_formats.sidecar import check_output_directory
    from kvq_runtime.models import load_model, resolve_model

    started = time.monotonic()
    config = quantization({}, bits=bits, key_bits=None, value_bits=None)
    resolved = resolve_model()
    with ExitStack() as stack:
        if destination is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvq-demo-")))
            folder = scratch / default_folder(resolved.record.name, config)
        else:
            folder = destination
        check_output_directory(folder, overwrite=overwrite)
        plan = plan_calibration(resolved, config=config, num_samples=NUM_SAMPLES, seq_len=SEQ_LEN)
        calibrated = run_plan(output, plan, folder, overwrite=overwrite, batch_size=1)
        loaded = load_model(resolved)
        sources = [
            replace(load_text(name, purpose="eval"), name=title) for name, title in TEXTS.items()
        ]
        texts = cut_texts(output, loaded.tokenizer, sources, seq_len=SEQ_LEN, limit=WINDOWS)
        name, sidecar = folder.name, calibrated.sidecar
        measured = measure(output, loaded.model, {name: sidecar}, texts, batch_size=1)
        described = f"{resolved.record.id}, {resolved.record.fingerprint.summary}"
        output.show(facts([("model", described), *calibrated.facts()]), *tables(measured))
        prompt = token_windows(loaded.tokenizer, sources[0], num_windows=1, seq_len=PROMPT_TOKENS)
        shown = demonstrate(output, loaded, name, sidecar, prompt, new_tokens=NEW_TOKENS)
        seconds = time.monotonic() - started
        payload = {
            "schema": SCHEMA,
            "calibration": calibrated.to_json(),
            "texts": [text.to_json(per_window=False) for text in measured],
            "generation": shown.to_json(),
            "seconds": round(seconds, 3),
            "peak_memory": peak_memory_json(),
        }
        ending = [
            ("the whole demo", f"{seconds:.1f} s, peak memory {peak_memory()}"),
            *([] if destination else [("", "the sidecar was temporary; -o DIR keeps it")]),
        ]
        output.result(payload, facts(ending), shown.table())
    output.next("kvq calibrate Qwen/Qwen3-0.6B --bits 3")
