"""Baselines for ``kvq eval --baseline``: names taken apart, and what they are calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from kvq_cli.output import Output
from kvq_formats.errors import KVQError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_evaluation.baselines.named import Baseline, BaselineName
    from kvq_evaluation.samples import LayerSamples
    from kvq_formats.records import CalibrationRecord
    from kvq_formats.sidecar import Sidecar

NUM_SAMPLES = 16


def parse_baselines(names: Sequence[str] | None) -> list[BaselineName]:
    """``--baseline a,b --baseline c`` taken apart, each once, in order; raises ConfigError."""
    from kvq_evaluation.baselines.named import BaselineName

    parts = [part.strip() for given in names or () for part in given.split(",")]
    return [BaselineName.parse(part) for part in dict.fromkeys(filter(None, parts))]


def make_baselines(
    output: Output,
    asked: Sequence[BaselineName],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sidecars: Mapping[str, Sidecar],
    *,
    seq_len: int,
) -> dict[str, Baseline]:
    """Build each baseline for this model, with the sinks and recent tokens of the first sidecar.

    Those that need calibration get the text that the first sidecar was calibrated on, or the
    built-in one.
    """
    from kvq_runtime.models import quantized_layers

    first = next(iter(sidecars.values()), None)
    sink_tokens = 1 if first is None else first.config.sink_tokens
    recent_tokens = 0 if first is None else first.config.recent_tokens
    record = None if first is None else first.calibration

    @cache
    def samples() -> dict[int, LayerSamples]:
        return _samples(output, model, tokenizer, record, seq_len=seq_len, sink_tokens=sink_tokens)

    for name, sidecar in list(sidecars.items())[1:]:
        if (sidecar.config.sink_tokens, sidecar.config.recent_tokens) != (
            sink_tokens,
            recent_tokens,
        ):
            output.warn(f"{name} keeps other tokens exact than what baselines are given")
    layers = quantized_layers(model.config)
    return {
        one.name: one.make(
            layers=layers, samples=samples, sink_tokens=sink_tokens, recent_tokens=recent_tokens
        )
        for one in asked
    }


def _samples(
    output: Output,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: CalibrationRecord | None,
    *,
    seq_len: int,
    sink_tokens: int,
) -> dict[int, LayerSamples]:
    from kvq_calibration.data import load_text, token_windows
    from kvq_evaluation.samples import collect_samples

    dataset, seed = ("builtin", 0) if record is None else (record.dataset, record.seed)
    length = seq_len if record is None else record.seq_len
    windows = NUM_SAMPLES if record is None else record.num_samples
    try:
        text = load_text(dataset, purpose="calibrate")
    except KVQError as error:
        output.note(f"baselines are calibrated on builtin: {dataset} cannot be read ({error})")
        text = load_text("builtin", purpose="calibrate")
    cut = token_windows(tokenizer, text, num_windows=windows, seq_len=length, seed=seed)
    with output.progress("samples") as progress, progress.stage("samples", 1) as done:
        found = collect_samples(model, cut.input_ids, sink_tokens=sink_tokens)
        done()
    return found
