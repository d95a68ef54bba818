"""What packing a prompt costs, with error feedback and without, beside what else its layer does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from gpu_cases import PackedLayerTables, random_numbers
from gpu_report import CUT, Deadline
from gpu_shapes import Bench, Codes
from gpu_timing import Lap, copies_of, race
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention, silu

MATRICES = "bf16 layer: seven matrices"
WAYS = {"keys and values": True, "keys and values, without feedback": False}
"""Rows of packing, and whether with error feedback, as is the default."""


def prefill_backends(device: torch.device) -> dict[str, SDPBackend]:
    """Backends of SDPA that are worth a prompt."""
    if device.type != "cuda":
        return {"math": SDPBackend.MATH}
    return {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def run(bench: Bench, deadline: Deadline) -> None:
    """A prompt's keys and values of one layer, beside what else that layer does with the prompt."""
    sizes, device, report = bench.sizes, bench.device, bench.report
    shape, T = sizes.prompt_shape, sizes.prompt
    H, D = shape.num_kv_heads, shape.head_dim
    where: dict[str, Any] = {"shape": shape.name, "batch": 1, "tokens": T}
    packed: dict[tuple[str, Codes], float] = {}
    with report.guarded("pack", "prompt", **where):
        first = [random_numbers(H, T, D, device=device) for _ in range(2)]
        read = sum(x.nbytes for x in first)
        copies = [first]
        copies += [[x.clone() for x in first] for _ in range(copies_of(read, device=device) - 1)]
        laps: dict[str, Lap] = {}
        moved: dict[str, int] = {}
        rows = {f"{what}: {codes.name}": (what, codes) for codes in sizes.codes for what in WAYS}
        for name, (what, codes) in rows.items():
            layer = PackedLayerTables.of(shape, codes, device=device, feedback=WAYS[what])
            laps[name] = [_packing(layer, *copy) for copy in copies]
            written = [
                getattr(part, field.name).nbytes
                for part in _packing(layer, *first)()
                for field in fields(part)
            ]
            moved[name] = read + sum(written)
        timings = race(laps, device=device, expired=deadline.passed)
        for name, (what, codes) in rows.items():
            timing, cells = timings[name], where | codes.columns
            report.add_timing("pack", what, timing, **cells)
            if timing.samples:
                packed[what, codes] = timing.median
                rate = moved[name] / timing.median / 1e9
                report.add("pack", what, "bandwidth", rate, "GB/s", **cells)
    if deadline.passed():
        report.add("pack", "bf16 layer", "us", "", "us", CUT, **where)
        return
    with report.guarded("pack", "bf16 layer", **where):
        parts: dict[str, float] = {}
        for name, lap in _layer_laps(bench).items():
            timing = race({name: lap}, device=device)[name]
            report.add_timing("pack", name, timing, **where)
            if timing.samples:
                parts[name] = timing.median
        attention = min((s for name, s in parts.items() if name != MATRICES), default=None)
        if attention is None or MATRICES not in parts:
            return
        note = "of the best causal attention and the matrices"
        for (what, codes), seconds in packed.items():
            share, cells = seconds / (attention + parts[MATRICES]), where | codes.columns
            report.add("pack", what, "share of prefill", share, "x", note, **cells)


def _packing(layer: PackedLayerTables, keys: Tensor, values: Tensor) -> Callable[[], tuple]:
    return lambda: (layer.keys.pack(keys), layer.values.pack(values))


def _layer_laps(bench: Bench) -> dict[str, Lap]:
    """Causal attention of the whole prompt, and the seven matrices of the layer, in bf16."""
    sizes, device = bench.sizes, bench.device
    shape, T, width = sizes.prompt_shape, sizes.prompt, sizes.hidden
    D = shape.head_dim
    query = random_numbers(1, shape.num_heads, T, D, device=device)
    keys, values = (random_numbers(1, shape.num_kv_heads, T, D, device=device) for _ in range(2))
    laps: dict[str, Lap] = {}
    for name, backend in prefill_backends(device).items():
        laps[f"bf16 layer: causal attention, sdpa {name}"] = [
            _causal(backend, query, keys, values, enable_gqa=True)
        ]
    repeated = [x.repeat_interleave(shape.group, 1) for x in (keys, values)]
    for name, backend in prefill_backends(device).items():
        laps[f"bf16 layer: causal attention, sdpa {name}, repeated heads"] = [
            _causal(backend, query, *repeated)
        ]
    hidden = random_numbers(T, width, device=device)
    attended, served = shape.num_heads * D, shape.num_kv_heads * D
    sizes_of = [(attended, width), (served, width), (served, width), (width, attended)]
    sizes_of += [(sizes.intermediate, width)] * 2 + [(width, sizes.intermediate)]
    # As trained weights: outputs as large as inputs.
    weights = [random_numbers(*size, device=device) * size[1] ** -0.5 for size in sizes_of]

    def matrices() -> Tensor:
        q, k, v, o, gate, up, down = weights
        linear(hidden, k)
        linear(hidden, v)
        x = linear(linear(hidden, q), o)
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    laps[MATRICES] = [matrices]
    return laps


def _causal(backend: SDPBackend, *tensors: Tensor, **how: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*tensors, is_causal=True, **how)

    return run
