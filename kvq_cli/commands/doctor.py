"""``kvq doctor``: whether a model can be quantized and run here, before anything costly starts."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli.options import (
    QUANTIZATION,
    AsJson,
    Bits,
    DeviceMap,
    Dtype,
    DtypeOption,
    ModelAlias,
    NoProgress,
    Quiet,
    Revision,
    TrustRemoteCode,
    Verbose,
    chosen_model,
    model_argument,
    option,
)
from kvq_cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvq_cli.checks.check import Asked
    from kvq_cli.checks.diagnosis import Diagnosis

SCHEMA = "kvq.doctor/1"


def doctor(
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
    outlier_fraction: Annotated[
        float,
        option(
            "--outlier-fraction",
            panel=QUANTIZATION,
            help="Share of entries that the thresholds leave outside, 0 to 0.2; 0: none.",
        ),
    ] = 0.01,
    size: Annotated[
        str | None,
        option(
            "--context",
            panel=QUANTIZATION,
            metavar="SIZE",
            help="Tokens that shall fit into memory: 4096, 32k, 1M, ...",
            default="32k, or what the model was made for",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Say whether a model can be quantized and run here.

    Reads configuration, tokenizer and headers of weight files, and tries a
    random miniature of the model, with its own code, on packed pages that lose
    nothing. Says which layers are quantized and what stays as it is, what the
    cache takes a token, and what fits into memory and on the disk. No weights
    are loaded. Leaves with 3 if another command would fail.

    [bold]Examples[/bold]
      kvq doctor
      kvq doctor Qwen/Qwen3-0.6B --bits 3 --context 128k
      kvq doctor ./my-model --json
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    from pathlib import Path

    from kvq_cli.calibration import quantization
    from kvq_cli.checks.check import Asked
    from kvq_cli.checks.diagnosis import diagnose
    from kvq_cli.sizes import parse_tokens
    from kvq_formats.errors import GateMissedError

    name = chosen_model(model, model_alias)
    asked = Asked(
        model=name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        config=quantization(
            {"outlier_fraction": outlier_fraction},
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
        ),
        dtype=dtype.value,
        device_map=device_map,
        context=None if size is None else parse_tokens(size, flag="--context"),
    )
    if name is None:
        output.note("no MODEL is named: looking at the small built-in model")
    diagnosis = diagnose(asked, output_folder=Path.cwd())
    for line in diagnosis.found.notes:
        output.note(line)
    following = shlex.join(_calibrate(asked))
    output.result(_payload(diagnosis, asked, following), *_parts(diagnosis))
    if failed := diagnosis.failed:
        names = ", ".join(check.name for check in failed)
        raise GateMissedError(
            f"{len(failed)} of {len(diagnosis.checks)} checks failed: {names}.",
            hint=next((check.hint for check in failed if check.hint), None),
        )
    output.next(following)


def _parts(diagnosis: Diagnosis) -> list[RenderableType]:
    """Tables for people."""
    from kvq_cli.output import table

    parts: list[RenderableType] = [
        table(("check", "", "found"), [check.row() for check in diagnosis.checks], left=3)
    ]
    if diagnosis.layers:
        kinds = ("layers", "kind", "cache", "keys", "special")
        parts.append(table(kinds, [group.row() for group in diagnosis.layers], left=5))
    if diagnosis.cache is not None:
        headers = ("cache of one text", "bf16", "packed")
        caption = f"packed: {diagnosis.cache.ratio:.1f} times less a token, counted from bytes"
        parts.append(table(headers, diagnosis.cache.rows(), caption=caption))
    return parts


def _payload(diagnosis: Diagnosis, asked: Asked, following: str) -> dict[str, Any]:
    """The same for programs."""
    found, failed = diagnosis.found, diagnosis.failed
    record = None if found.resolved is None else found.resolved.record.model_dump(mode="json")
    return {
        "schema": SCHEMA,
        "ok": not failed,
        "failed": [check.name for check in failed],
        "model": found.name,
        "base_model": record,
        "config": asked.config.model_dump(mode="json"),
        "checks": [check.to_json() for check in diagnosis.checks],
        "layers": [group.to_json() for group in diagnosis.layers],
        "cache": None if diagnosis.cache is None else diagnosis.cache.to_json(),
        **diagnosis.numbers,
        "next": None if failed else following,
    }


def _calibrate(asked: Asked) -> list[str]:
    """The command that usually follows, with what the user has given."""
    config = asked.config
    key, value = config.key_bits, config.value_bits
    widths = (
        ["--bits", str(key)]
        if key == value
        else ["--key-bits", str(key), "--value-bits", str(value)]
    )
    default = type(config).model_fields["outlier_fraction"].default
    given = {
        "--revision": asked.revision,
        "--dtype": None if asked.dtype == "auto" else asked.dtype,
        "--device-map": asked.device_map,
        "--outlier-fraction": None
        if config.outlier_fraction == default
        else f"{config.outlier_fraction:g}",
    }
    options = [word for flag, text in given.items() if text is not None for word in (flag, text)]
    trusted = ["--trust-remote-code"] if asked.trust_remote_code else []
    model = [] if asked.model is None else [asked.model]
    return ["kvq", "calibrate", *model, *widths, *options, *trusted]
