"""Baselines for a model, by their names: what they keep exact, and what they are calibrated on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from kvq_evaluation.baselines.named import Baseline, BaselineName
from kvq_formats.errors import ConfigError, KVQError
from kvq_formats.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_evaluation.samples import LayerSamples
    from kvq_formats.records import CalibrationRecord
    from kvq_formats.sidecar import Sidecar

logger = logging.getLogger(__name__)

NUM_SAMPLES = 16


def parse_baselines(names: str | Sequence[str] | None) -> list[BaselineName]:
    """Names, or several with commas between, taken apart: each once, in order.

    Raises ConfigError for a name that is no baseline.
    """
    given = [names] if isinstance(names, str) else names or ()
    parts = [part.strip() for one in given for part in one.split(",")]
    return [BaselineName.parse(part) for part in dict.fromkeys(filter(None, parts))]


def build_baselines(
    asked: Sequence[BaselineName],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    sidecars: Mapping[str, Sidecar],
    *,
    seq_len: int,
    on_note: Callable[[str], None] = logger.warning,
    progress: Progress | None = None,
) -> dict[str, Baseline]:
    """Build each baseline for this model, with the sinks and recent tokens of the first sidecar.

    Args:
        asked: names taken apart.
        model: a causal language model.
        tokenizer: its own; None where no method is calibrated.
        sidecars: by name. Methods that are calibrated get the text that the first one was
            calibrated on; without a sidecar, or where that text cannot be read, the built-in one.
        seq_len: tokens a window of that text where there is no sidecar.
        on_note: hears of sidecars that keep other tokens exact, and of a text that cannot be read.
        progress: told of a step when the samples are there.

    Returns them by name. Raises ConfigError for a method that is calibrated and no tokenizer, and
    what building and calibrating them raises.
    """
    from kvq_evaluation.samples import collect_samples
    from kvq_runtime.models import quantized_layers

    _check_tokenizer(asked, tokenizer)
    first = next(iter(sidecars.values()), None)
    exact = (1, 0) if first is None else (first.config.sink_tokens, first.config.recent_tokens)
    if asked:
        for name, sidecar in sidecars.items():
            if (sidecar.config.sink_tokens, sidecar.config.recent_tokens) != exact:
                on_note(f"{name} keeps other tokens exact than what baselines are given")
    sink_tokens, recent_tokens = exact

    @cache
    def samples() -> dict[int, LayerSamples]:
        assert tokenizer is not None
        record = None if first is None else first.calibration
        input_ids = _calibration_tokens(tokenizer, record, seq_len=seq_len, on_note=on_note)
        with (progress or SilentProgress()).stage("samples", 1) as done:
            found = collect_samples(model, input_ids, sink_tokens=sink_tokens)
            done()
        return found

    layers = quantized_layers(model.config)
    return {
        one.name: one.make(
            layers=layers, samples=samples, sink_tokens=sink_tokens, recent_tokens=recent_tokens
        )
        for one in asked
    }


def _check_tokenizer(
    asked: Sequence[BaselineName], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    calibrated = [one.name for one in asked if one.method.calibrated]
    if calibrated and tokenizer is None:
        raise ConfigError(
            f"no tokenizer is given, expected one: {', '.join(calibrated)} must be calibrated.",
            hint="kvq.evaluate(model, sidecars, tokens=tokens, baselines=[...], "
            "tokenizer=tokenizer)",
        )


def _calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    record: CalibrationRecord | None,
    *,
    seq_len: int,
    on_note: Callable[[str], None],
) -> Tensor:
    """Token ids int64 ``[S, T]`` of the text that ``record`` names, of the built-in one without."""
    from kvq_calibration.data import load_text, token_windows

    dataset, seed = ("builtin", 0) if record is None else (record.dataset, record.seed)
    length = seq_len if record is None else record.seq_len
    windows = NUM_SAMPLES if record is None else record.num_samples
    try:
        text = load_text(dataset, purpose="calibrate")
    except KVQError as error:
        on_note(f"baselines are calibrated on builtin: {dataset} cannot be read ({error})")
        text = load_text("builtin", purpose="calibrate")
    return token_windows(tokenizer, text, num_windows=windows, seq_len=length, seed=seed).input_ids
