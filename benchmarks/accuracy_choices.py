"""What each choice is worth, and what did not pay: one change at a time, on development text.

    python benchmarks/accuracy_choices.py

The three models of ``accuracy.py``, both paths, 2 and 3 bits. Rows go to
``benchmarks/results/accuracy-choices-NAME.csv``, differences paired over windows with the same
width as it is by default; ``docs/accuracy.md`` shows them. ``--here --model NAME`` measures one
model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from accuracy_models import SEQ_LEN, TITLES, calibration_text, open_model, run_each

from kvq_formats.config import KVQConfig

if TYPE_CHECKING:
    from torch import nn

    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.models import LoadedModel

RESULTS = Path(__file__).resolve().parent / "results"
WINDOWS = 8
DEFAULT = "as it is by default"
WIDTHS = (2, 3)

CHANGES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "no error feedback": {"feedback": False},
    "no margin": {"range_margin": 1.0},
    "no Q-Norm": {"qnorm": False},
    "no sensitivity, no feedback": {"sensitivity": "none", "feedback": False},
    "a value scale a head": {"value_grain": "head"},
    "no outliers": {"outlier_fraction": 0.0},
    "2 % outliers": {"outlier_fraction": 0.02, "outlier_capacity": 0.02},
    "2 % of values, room for 1 % of keys": {"outlier_fraction": 0.02},
    "value room 1.5": {"value_capacity_factor": 1.5},
    "16 sinks": {"sink_tokens": 16},
    "32 recent tokens": {"recent_tokens": 32},
    "128 recent tokens": {"recent_tokens": 128},
}
"""Change -> options; each at every width."""

MIXED = {"2-bit keys, 3-bit values": (2, 3), "3-bit keys, 2-bit values": (3, 2)}
ROTATED, SEQUENTIAL = "Hadamard on values", "later layers see earlier ones quantized"

PATCHED = {
    "feedback by all gradients alike": ("kvq_calibration.moments.FAR_SHARE", 0.0),
    "codebooks of numbers, no shift": ("kvq_calibration.refit.ROUNDS", 0),
}
"""Change -> a constant of the calibration, and what it is set to."""

PATHS = ("prefill", "decode")


def measure(name: str) -> list[dict[str, Any]]:
    """Rows of one model."""
    from accuracy_one_forward import as_codecs
    from results_csv import PlainProgress, provenance
    from shared_measurement import calibrate_all

    from kvq_calibration.data import load_text, token_windows
    from kvq_evaluation.caches import evaluate_caches
    from kvq_evaluation.statistics import paired_difference

    progress = PlainProgress()
    with open_model(name) as loaded:
        calibrate = partial(_calibrate, loaded, calibrate_all, progress)
        configs = {
            f"{change} @ {bits}": KVQConfig.create(key_bits=bits, value_bits=bits, **options)
            for change, options in CHANGES.items()
            for bits in WIDTHS
        }
        configs |= {
            f"{change} @ 2.5": KVQConfig.create(key_bits=key, value_bits=value)
            for change, (key, value) in MIXED.items()
        }
        plain = {f"@ {bits}": configs[f"{DEFAULT} @ {bits}"] for bits in WIDTHS}
        sidecars = calibrate(configs)
        with _sequential(sidecars[f"{DEFAULT} @ 2"]):
            sidecars |= {f"{SEQUENTIAL} {k}": made for k, made in calibrate(plain).items()}
        for change, (constant, value) in PATCHED.items():
            with patch(constant, value):
                sidecars |= {f"{change} {k}": made for k, made in calibrate(plain).items()}
        windows = token_windows(
            loaded.tokenizer,
            load_text("builtin:dev", purpose="eval"),
            num_windows=WINDOWS,
            seq_len=SEQ_LEN,
        )
        evaluate = partial(
            evaluate_caches, loaded.model, windows.input_ids, {}, dataset=windows.name,
            windows_available=windows.windows_total, path=PATHS, progress=progress,
        )  # fmt: skip
        rows = evaluate(as_codecs(sidecars))[1:]
        with _rotated_values(loaded.model):
            rotated = {f"{ROTATED} {k}": made for k, made in calibrate(plain).items()}
            rows += evaluate(as_codecs(rotated))[1:]
        origin = provenance(loaded.model, name=name, seq_len=SEQ_LEN)
    found = []
    by_name = {(row.name, row.path): row for row in rows}
    for row in rows:
        change, _, bits = row.name.partition(" @ ")
        default = by_name.get((f"{DEFAULT} @ {bits}", row.path))
        gap = None
        if default is not None and default is not row:
            gap = paired_difference(row.metrics, default.metrics)
        found.append(
            {
                **origin, "dataset": row.dataset, "windows": row.windows, "change": change,
                "bits": bits, "path": row.path, "effective_bits": row.effective_bits, "kl": row.kl,
                "kl_stderr": row.kl_stderr, "difference": gap and gap.mean,
                "difference_stderr": gap and gap.stderr, "agreement": row.agreement,
            }
        )  # fmt: skip
    return found


def _calibrate(
    loaded: LoadedModel, calibrate_all: Any, progress: Any, configs: dict[str, KVQConfig]
) -> dict[str, Sidecar]:
    windows, record = calibration_text(loaded, 0)
    made: dict[str, Sidecar] = calibrate_all(
        loaded.model, windows, configs, base_model=loaded.record, calibration=record,
        progress=progress,
    )  # fmt: skip
    return made


@contextmanager
def _sequential(sidecar: Sidecar) -> Iterator[None]:
    """Calibration sees keys and values that earlier layers, quantized by ``sidecar``, lead to.

    Gradients pass through rounding as if it were not there.
    """
    import torch
    from torch import Tensor

    from kvq_calibration.capture import KeyValueTap
    from kvq_calibration.far_gradients import FarGradientTap
    from kvq_runtime.rope import AttentionCall
    from kvq_runtime.rotary_channels import key_before_rope
    from kvq_runtime.sidecar_codec import SidecarCodec

    codec = SidecarCodec(sidecar)
    sinks = codec.sink_tokens

    def decoded(decode: Any, layer_idx: int, x: Tensor) -> Tensor:
        rows = [decode(layer_idx, row[:, sinks:].float()) for row in x]
        return torch.cat([x[:, :, :sinks], torch.stack(rows).to(x.dtype)], dim=2)

    def quantized(call: AttentionCall) -> AttentionCall:
        before, at = key_before_rope(call), call.layer_idx
        with torch.no_grad():
            key_error = before.rotated(decoded(codec.decoded_keys, at, before.key)) - call.key
            value_error = decoded(codec.decoded_values, at, call.value) - call.value
        attend = call.attend
        return replace(call, attend=lambda q, k, v: attend(q, k + key_error, v + value_error))

    def seeing(kind: Any) -> Any:
        class Tap(kind):  # type: ignore[misc]
            def on_attention(self, call: AttentionCall) -> Any:
                return super().on_attention(quantized(call))

        return Tap

    with (
        patch("kvq_calibration.pipeline.KeyValueTap", seeing(KeyValueTap)),
        patch("kvq_calibration.pipeline.FarGradientTap", seeing(FarGradientTap)),
    ):
        yield


@contextmanager
def _rotated_values(model: nn.Module) -> Iterator[None]:
    """Turn every value head by a Hadamard matrix, and the output projection back."""
    from kvq_evaluation.baselines.hadamard_int import hadamard

    with ExitStack() as stack:
        for module in model.modules():
            if not hasattr(module, "v_proj"):
                continue
            values, outputs = module.v_proj.weight.data, module.o_proj.weight.data
            for weight in (values, outputs):
                stack.callback(weight.copy_, weight.clone())
            turn = hadamard(module.head_dim)
            values.copy_((turn @ values.unflatten(0, (-1, len(turn)))).flatten(0, 1))
            outputs.copy_((outputs.unflatten(1, (-1, len(turn))) @ turn.T).flatten(1))
        yield


def main() -> None:
    """Measure the models, as many at a time as there are cores, and write one CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=TITLES, action="append", help="one of them [all]")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    models = arguments.model or list(TITLES)
    if arguments.here:
        from results_csv import write_csv

        for name in models:
            write_csv(arguments.output / f"accuracy-choices-{name}.csv", measure(name))
        return
    run_each(__file__, models, ["-o", str(arguments.output)], processes=arguments.processes)


if __name__ == "__main__":
    main()
