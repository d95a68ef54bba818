"""From names to a sidecar: find model and text, check both cheaply, then measure.

``plan_calibration`` touches no weights, so that whatever can be wrong is said before anything
costly starts; ``CalibrationPlan.run`` does the work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvq_calibration.allocation import check_average, even_widths
from kvq_calibration.data import TextSource, load_text, token_windows
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_runtime.supported_models import quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_formats.progress import Progress
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.models import LoadedModel, ResolvedModel

logger = logging.getLogger(__name__)

DEFAULT_NUM_SAMPLES = 16
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class CalibrationPlan:
    """What will be measured, on what, and with which options; all of it checked.

    Fields:
        model: found, its configuration read, no weights loaded.
        source: the text; little or nothing of it is read yet.
        config: options of the quantized cache.
        average_bits: what the widths of layers may be on average; None: they are ``config``'s.
        num_samples, seq_len: windows, and tokens a window.
        seed: chooses the windows.
        notes: what the user should know, such as a clamped length.
    """

    model: ResolvedModel
    source: TextSource
    config: KVQConfig
    num_samples: int
    seq_len: int
    seed: int
    notes: tuple[str, ...] = ()
    average_bits: float | None = None

    @property
    def config_in_bits(self) -> KVQConfig:
        """A config that takes as many bits as what will be made; its widths are not chosen yet."""
        if self.average_bits is None:
            return self.config
        layers = quantized_layers(self.model.config)
        return self.config.with_layer_bits(even_widths(layers, self.average_bits))

    def run(
        self,
        *,
        dtype: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
        load_in: str | None = None,
        batch_size: int = 1,
        progress: Progress | None = None,
        on_note: Callable[[str], None] = logger.warning,
        loaded: LoadedModel | None = None,
    ) -> Sidecar:
        """Cut the text into windows, load the model unless it is ``loaded``, calibrate.

        ``on_note`` hears what cutting has to say; the plan's own notes are left to the caller.
        Raises what ``token_windows``, ``load_model`` and ``calibrate`` raise.
        """
        from kvq_calibration.pipeline import calibrate
        from kvq_runtime.models import load_model, load_tokenizer

        # The text is cut first: too little of it is found out before weights are loaded.
        windows = token_windows(
            loaded.tokenizer if loaded is not None else load_tokenizer(self.model),
            self.source,
            num_windows=self.num_samples,
            seq_len=self.seq_len,
            seed=self.seed,
        )
        for note in windows.notes:
            on_note(note)
        if loaded is None:
            loaded = load_model(
                self.model,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=attn_implementation,
                load_in=load_in,
            )
        return calibrate(
            loaded.model,
            windows.input_ids,
            self.config,
            base_model=loaded.record,
            calibration=CalibrationRecord(
                dataset=windows.name,
                revision=windows.revision,
                num_samples=self.num_samples,
                seq_len=self.seq_len,
                seed=self.seed,
                token_sha256=windows.token_sha256,
            ),
            average_bits=self.average_bits,
            batch_size=batch_size,
            progress=progress,
        )


def plan_calibration(
    model: ResolvedModel,
    *,
    config: KVQConfig,
    average_bits: float | None = None,
    dataset: str = "builtin",
    split: str | None = None,
    text_column: str | None = None,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seq_len: int = DEFAULT_SEQ_LEN,
    seed: int = 0,
    model_class: type[PreTrainedModel] | None = None,
) -> CalibrationPlan:
    """Try the model out, find the text and fit the windows to the model; no weights are loaded.

    Windows longer than the model's positions are clamped to them, with a note. ``model_class`` is
    that of a model which is loaded already. Raises what ``examine`` and ``load_text`` raise, and
    ConfigError for an average that no widths have.
    """
    if average_bits is not None:
        check_average(average_bits, config)
    from kvq_runtime.examine import examine

    examine(
        model.config,
        name=model.record.id,
        model_class=model_class,
        trust_remote_code=model.trust_remote_code,
    )
    notes = list(model.notes)
    positions = model.max_positions
    if positions is not None and seq_len > positions:
        notes.append(f"--seq-len {seq_len} is clamped to the model's {positions} positions")
        seq_len = positions
    source = load_text(dataset, purpose="calibrate", split=split, text_column=text_column)
    return CalibrationPlan(
        model=model,
        source=source,
        config=config,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        notes=tuple(notes),
        average_bits=average_bits,
    )


def calibrate_from_text(
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bits: int | None = None,
    average_bits: float | None = None,
    config: KVQConfig | None = None,
    dataset: str = "builtin",
    split: str | None = None,
    text_column: str | None = None,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seq_len: int = DEFAULT_SEQ_LEN,
    batch_size: int = 1,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    load_in: str | None = None,
    progress: Progress | None = None,
    on_note: Callable[[str], None] = logger.warning,
) -> Sidecar:
    """Measure a model on sample text and return what its quantized cache needs.

    Args:
        model: ``org/name``, ``org/name@revision``, a folder, or a loaded model; None: the embedded
            one.
        tokenizer: of a loaded model; its own, from where it was loaded, without.
        bits: width of a code of keys and values alike, 2, 3 or 4; 4 without ``config``.
        average_bits: instead of ``bits``, widths of 2 to 4 for each layer's keys and values, chosen
            by expected loss, with this average.
        config: all options of the quantized cache, instead of ``bits``.
        dataset, split, text_column: the text; see ``kvq_calibration.data.load_text``.
        num_samples, seq_len: windows, and tokens a window (at most the model's positions).
        batch_size: windows a step.
        seed: chooses the windows.
        revision, dtype, device_map, attn_implementation, trust_remote_code, load_in: how the model
            is loaded, unless it is; see ``kvq_runtime.models``.
        progress: who hears how far it is.
        on_note: who hears what the user should know; a logged warning otherwise.

    Raises KVQError for everything that the caller can mend: an unknown model, too little text,
    options that make no sense, activations that are not finite.
    """
    from kvq_runtime.models import LoadedModel, load_tokenizer, resolve_model

    if config is not None and bits is not None:
        raise ConfigError(
            f"bits={bits} and config= were both given.", hint="KVQConfig(key_bits=, value_bits=)"
        )
    if bits is not None and average_bits is not None:
        raise ConfigError(
            f"bits={bits} and average_bits={average_bits:g} were both given.",
            hint="bits=3, or average_bits=2.75",
        )
    if config is None:
        width = 4 if bits is None else bits
        config = KVQConfig.create(key_bits=width, value_bits=width)
    loaded = None
    if model is None or isinstance(model, str | os.PathLike):
        resolved = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    else:
        resolved = _describe(model)
        loaded = LoadedModel(model, tokenizer or load_tokenizer(resolved), resolved.record)
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
        model_class=None if loaded is None else type(loaded.model),
    )
    for note in plan.notes:
        on_note(note)
    return plan.run(
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        load_in=load_in,
        batch_size=batch_size,
        progress=progress,
        on_note=on_note,
        loaded=loaded,
    )


def _describe(model: PreTrainedModel) -> ResolvedModel:
    """Say of a loaded model what ``resolve_model`` says of a name.

    Raises UnsupportedModelError for a model that kvq does not understand.
    """
    from kvq_runtime.models import ResolvedModel
    from kvq_runtime.supported_models import check_supported, text_config

    location = model.name_or_path or type(model).__name__
    check_supported(model.config, name=location)
    record = BaseModelRecord(
        id=os.path.abspath(location) if os.path.isdir(location) else location,
        revision=getattr(model.config, "_commit_hash", None),
        fingerprint=Fingerprint.from_config(text_config(model.config)),
    )
    return ResolvedModel(
        location=location, is_local=os.path.isdir(location), config=model.config, record=record
    )
