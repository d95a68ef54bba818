"""Calibrating as ``kvq calibrate`` and ``kvq demo`` do: run a plan, save, say what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq_cli.bits import bits_facts, bits_json, codes_in_words, reported_bits
from kvq_cli.calibration_memory import memory_facts
from kvq_cli.output import Output
from kvq_cli.peak_memory import peak_memory, peak_memory_json
from kvq_formats.errors import ConfigError

if TYPE_CHECKING:
    from kvq_calibration.memory import CalibrationMemory
    from kvq_calibration.plan import CalibrationPlan
    from kvq_formats.config import KVQConfig
    from kvq_formats.sidecar import Sidecar

STAGES = ("thresholds", "sensitivity", "codebooks")
"""What the pipeline does, in order."""

STAGES_OF_AVERAGE = ("thresholds", "sensitivity", "codebooks of all widths", "widths", "codebooks")
"""The same where widths are chosen."""

KNOWN_BITS = (2, 3, 4)


@dataclass(frozen=True)
class Calibrated:
    """A sidecar on the disk, and what it took."""

    sidecar: Sidecar
    path: Path
    seconds: float

    def facts(self) -> list[tuple[str, str]]:
        """Rows for people."""
        bits = reported_bits(self.sidecar.config, self.sidecar.base_model.fingerprint)
        return [
            ("sidecar", str(self.path)),
            ("codes", codes_in_words(self.sidecar.config)),
            *bits_facts(bits),
            ("time", f"{self.seconds:.1f} s"),
            ("peak memory", peak_memory()),
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        made = self.sidecar
        bits = reported_bits(made.config, made.base_model.fingerprint)
        return {
            "sidecar": str(self.path),
            "base_model": made.base_model.model_dump(mode="json"),
            "calibration": made.calibration.model_dump(mode="json"),
            "config": made.config.model_dump(mode="json"),
            "effective_bits": bits_json(bits),
            "seconds": round(self.seconds, 3),
            "peak_memory": peak_memory_json(),
        }


def run_plan(
    output: Output,
    plan: CalibrationPlan,
    destination: Path,
    *,
    overwrite: bool,
    batch_size: int,
    dtype: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    load_in: str | None = None,
) -> Calibrated:
    """Measure the model and save its sidecar; the time includes loading and saving."""
    started = time.monotonic()
    stages = STAGES if plan.average_bits is None else STAGES_OF_AVERAGE
    with output.progress(*stages) as progress:
        sidecar = plan.run(
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            load_in=load_in,
            batch_size=batch_size,
            progress=progress,
            on_note=output.note,
        )
    sidecar.save(destination, overwrite=overwrite)
    return Calibrated(sidecar, destination, time.monotonic() - started)


def quantization(
    options: dict[str, Any],
    *,
    bits: int,
    key_bits: int | None,
    value_bits: int | None,
) -> KVQConfig:
    """Build the configuration from widths and other ``options`` by field; None is left out.

    Raises ConfigError that names the flag, or the field that makes no sense.
    """
    from kvq_formats.config import KVQConfig

    chosen = {"--bits": bits, "--key-bits": key_bits, "--value-bits": value_bits}
    for flag, number in chosen.items():
        if number is not None and number not in KNOWN_BITS:
            raise ConfigError(
                f"{flag} is {number}, expected 2, 3 or 4.",
                hint=f"{flag} 3 is a good start; several widths mix with --key-bits, --value-bits",
            )
    given = {name: value for name, value in options.items() if value is not None}
    return KVQConfig.create(key_bits=key_bits or bits, value_bits=value_bits or bits, **given)


def default_folder(
    model_name: str, config: KVQConfig, *, average_bits: float | None = None
) -> Path:
    """``./<model name>-kvq3``, ``-kvq-k2v3`` where keys and values differ, or ``-kvq2.75``."""
    if average_bits is not None:
        return Path(f"{model_name}-kvq{average_bits:g}")
    key, value = config.key_bits, config.value_bits
    suffix = f"kvq{key}" if key == value else f"kvq-k{key}v{value}"
    return Path(f"{model_name}-{suffix}")


def plan_facts(
    plan: CalibrationPlan, folder: Path, memory: CalibrationMemory
) -> list[tuple[str, str]]:
    """What ``--dry-run`` says."""
    model, config = plan.model.record, plan.config_in_bits
    codes = codes_in_words(config)
    if plan.average_bits is not None:
        codes = f"{plan.average_bits:g} bits on average, chosen layer by layer"
    return [
        ("dry run", "everything that can be checked without weights is in order"),
        ("model", f"{model.id}, {model.fingerprint.summary}"),
        ("text", f"{plan.source.name}, {plan.num_samples} x {plan.seq_len} tokens"),
        ("codes", codes),
        *bits_facts(reported_bits(config, model.fingerprint)),
        *memory_facts(memory),
        ("would write", str(folder)),
    ]


def plan_json(plan: CalibrationPlan, folder: Path, memory: CalibrationMemory) -> dict[str, Any]:
    """The same for programs."""
    return {
        "dry_run": True,
        "sidecar": str(folder),
        "base_model": plan.model.record.model_dump(mode="json"),
        "dataset": plan.source.name,
        "num_samples": plan.num_samples,
        "seq_len": plan.seq_len,
        "seed": plan.seed,
        "config": plan.config.model_dump(mode="json"),
        "average_bits": plan.average_bits,
        "effective_bits": bits_json(
            reported_bits(plan.config_in_bits, plan.model.record.fingerprint)
        ),
        "memory": memory.to_json(),
    }
