"""``kvq inspect``: what a sidecar is and what it costs, without its model."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli.options import AsJson, NoProgress, Quiet, Verbose, sidecars_in_environment
from kvq_cli.output import Output

if TYPE_CHECKING:
    from kvq_formats.sidecar import Sidecar

SCHEMA = "kvq.inspect/1"


def inspect(
    context: typer.Context,
    sidecar: Annotated[
        str | None,
        typer.Argument(
            help="Folder, file or Hub id. Without it: the current sidecar.",
            metavar="SIDECAR",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Show what a sidecar is and what its cache costs.

    Reads the sidecar only; no model is loaded. Effective bits are counted from
    bytes: codes, scales and outliers of complete pages, sinks, recent tokens,
    and the page that is not complete yet. The error of a layer is what its
    codebooks lost on the calibration text.

    [bold]Examples[/bold]
      kvq inspect
      kvq inspect ./Qwen3-0.6B-kvq3 --json
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    from kvq_cli.bits import bits_facts, bits_json, reported_bits
    from kvq_cli.output import facts, table
    from kvq_cli.session import current_sidecar
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.sidecars import find_sidecar

    path = sidecar
    if path is None and (named := sidecars_in_environment()):
        path = named[0]
        if len(named) > 1:
            output.note(f"KVQ_SIDECAR names {len(named)} sidecars; this is the first")
    if path is None:
        path = str(current_sidecar(output))
    loaded = Sidecar.load(find_sidecar(path))
    bits = reported_bits(loaded.config, loaded.base_model.fingerprint)
    layers = _layers(loaded)
    payload = {
        "schema": SCHEMA,
        "sidecar": path,
        "base_model": loaded.base_model.model_dump(mode="json"),
        "calibration": loaded.calibration.model_dump(mode="json"),
        "config": loaded.config.model_dump(mode="json"),
        "effective_bits": bits_json(bits),
        "layers": layers,
    }
    rows = [
        (
            str(layer["layer_idx"]),
            f"{layer['key_bits']}/{layer['value_bits']}",
            f"{layer['key_error']:.5f}",
            f"{layer['value_error']:.5f}",
            f"{100 * layer['key_outlier_share']:.2f} %",
            f"{100 * layer['value_outlier_share']:.2f} %",
        )
        for layer in layers
    ]
    output.result(
        payload,
        facts([("sidecar", path), *_facts(loaded), *bits_facts(bits)]),
        table(
            ("layer", "bits", "key error", "value error", "key outliers", "value outliers"),
            rows,
            caption="bits: of keys/of values; error: share of the weighted mean square that the "
            "codebook loses",
        ),
    )
    output.next(shlex.join(["kvq", "eval", "--sidecar", path, "--ppl", "wikitext2"]))


def _layers(sidecar: Sidecar) -> list[dict[str, Any]]:
    """Widths and statistics of each layer, in order."""
    from dataclasses import asdict

    described = []
    for layer_idx, statistics in sorted(sidecar.statistics.items()):
        config = sidecar.config.for_layer(layer_idx)
        widths = {"key_bits": config.key_bits, "value_bits": config.value_bits}
        described.append({"layer_idx": layer_idx, **widths, **asdict(statistics)})
    return described


def _facts(sidecar: Sidecar) -> list[tuple[str, str]]:
    """What it was made for, and how."""
    from kvq_cli.bits import codes_in_words

    config, model, text = sidecar.config, sidecar.base_model, sidecar.calibration
    shape = model.fingerprint
    revision = f" at {model.revision[:12]}" if model.revision else ""
    return [
        ("base model", f"{model.id}{revision}"),
        (
            "shape",
            f"{shape.model_type}, {shape.num_hidden_layers} layers, "
            f"{shape.num_kv_heads} KV heads, head_dim {shape.head_dim}",
        ),
        (
            "calibrated on",
            f"{text.dataset}, {text.num_samples} x {text.seq_len} tokens, seed {text.seed}",
        ),
        (
            "codes",
            f"{codes_in_words(config)}, "
            f"{100 * config.outlier_fraction:g} % outliers, one value scale a {config.value_grain}",
        ),
        (
            "options",
            f"{config.sink_tokens} sink and {config.recent_tokens} recent tokens, "
            f"sensitivity {config.sensitivity}, kmeans {config.kmeans}, "
            f"Q-Norm {'on' if config.qnorm else 'off'}, "
            f"feedback {'on' if config.feedback else 'off'}",
        ),
    ]
