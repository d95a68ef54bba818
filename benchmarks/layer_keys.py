"""Write the normalised keys of one layer and their weights, as calibration sees them.

    python benchmarks/layer_keys.py --model DIR [--layer 3] [--num-samples 32] -o FILE.safetensors

The file holds z and weight, f32 ``[n]``: inliers in [-1, 1] and F * half_range^2. It is real input
for ``kmeans.py --activations``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from results_csv import PlainProgress
from safetensors.torch import save_file

from kvq_calibration.capture import KeyValueTap, token_rows
from kvq_calibration.data import load_text, token_windows
from kvq_calibration.pipeline import find_thresholds
from kvq_calibration.sensitivity import (
    LossScale,
    activation_gradients,
    backward,
    squared_gradients,
)
from kvq_formats.config import KVQConfig
from kvq_runtime.models import load_model, resolve_model
from kvq_runtime.rope import tap_attention


def main() -> int:
    """Run the two passes of a calibration over one layer and save its points."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--dataset", default="builtin")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()

    loaded = load_model(resolve_model(options.model), dtype="float32")
    text = load_text(options.dataset, purpose="calibrate")
    windows = token_windows(
        loaded.tokenizer, text, num_windows=options.num_samples, seq_len=options.seq_len
    ).input_ids
    model, layer, config, progress = loaded.model, options.layer, KVQConfig(), PlainProgress()

    thresholds = find_thresholds(model, windows, config, (layer,), batch_size=1, progress=progress)
    center, half_range = thresholds[layer]
    tap, scale = KeyValueTap(layers=(layer,)), LossScale(model.dtype)
    points, weights = [], []
    with (
        tap_attention(model, tap),
        activation_gradients(model),
        progress.stage("sensitivity", len(windows)) as advance,
    ):
        for batch in windows.split(1):
            backward(model, tap, batch, scale)
            squared, _ = squared_gradients(tap, layer, scale)
            keys = token_rows(tap.keys[layer].numbers(), sink_tokens=config.sink_tokens)
            squared = token_rows(squared, sink_tokens=config.sink_tokens)
            z = (keys - center) / half_range
            inlier = z.abs() <= 1
            points.append(z[inlier])
            weights.append((squared * half_range.square())[inlier])
            advance()
    save_file({"z": torch.cat(points), "weight": torch.cat(weights)}, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
