"""The models that accuracy is measured on, and a process for each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kvq_formats.records import CalibrationRecord
    from kvq_runtime.models import LoadedModel

QWEN3 = Path(__file__).resolve().parent / "models" / "tiny-qwen3"

TITLES = {
    "tiny-llama": "Llama, heads of 64",
    "tiny-llama-outliers": "the same Llama, wide channels",
    "tiny-qwen3": "Qwen3, heads of 128",
}
"""Name -> title, in the order of tables."""

SEQ_LEN = 1024
NUM_SAMPLES = 16


@contextmanager
def open_model(name: str) -> Iterator[LoadedModel]:
    """The model in f32; one named outliers has wider channels until the context ends."""
    import torch

    from kvq_evaluation.rescale import outlier_channels
    from kvq_runtime.embedded import embedded_model_path
    from kvq_runtime.models import load_model, resolve_model

    torch.manual_seed(0)
    path = QWEN3 if name == "tiny-qwen3" else embedded_model_path()
    loaded = load_model(resolve_model(str(path)), dtype="float32")
    widened = name.endswith("outliers")
    with (
        outlier_channels(loaded.model, key_pairs=2, value_channels=1) if widened else nullcontext()
    ):
        yield loaded


def calibration_text(loaded: LoadedModel, seed: int) -> tuple[Tensor, CalibrationRecord]:
    """Windows int64 ``[S, T]`` of the built-in calibration text, and what a sidecar says of it."""
    from kvq_calibration.data import load_text, token_windows
    from kvq_formats.records import CalibrationRecord

    windows = token_windows(
        loaded.tokenizer,
        load_text("builtin", purpose="calibrate"),
        num_windows=NUM_SAMPLES,
        seq_len=SEQ_LEN,
        seed=seed,
    )
    record = CalibrationRecord(
        dataset=windows.name,
        revision=windows.revision,
        num_samples=NUM_SAMPLES,
        seq_len=SEQ_LEN,
        seed=seed,
        token_sha256=windows.token_sha256,
    )
    return windows.input_ids, record


def run_each(script: str, models: Sequence[str], options: Sequence[str], *, processes: int) -> None:
    """Run ``script --here --model NAME`` for each model, a thread each.

    Raises SystemExit where one fails, and stops the others.
    """
    waiting, running = list(models), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            command = [sys.executable, script, "--here", "--model", name, *options]
            running[name] = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        time.sleep(0.5)
        for name, process in list(running.items()):
            if (code := process.poll()) is None:
                continue
            del running[name]
            if code:
                for other in running.values():
                    other.terminate()
                sys.exit(f"{name} failed with exit code {code}")
