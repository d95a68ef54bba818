"""Attention of a chunk of queries over a packed past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_baselines import relative_error
from gpu_cases import SINKS, PackedLayerTables, ReferencePages, random_numbers
from gpu_pack import prefill_backends
from gpu_report import CUT, Deadline
from gpu_shapes import Bench, Codes
from gpu_timing import Lap, brief, race
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels import attention
from kvq_kernels.attention import AttentionOptions, ExactTokens
from kvq_kernels.rotary import rotate
from kvq_kernels.workspace import Workspace

PREFILL_ERROR = 5e-3
BF16_ERROR = 2e-2


def run(bench: Bench, deadline: Deadline) -> None:
    """A chunk of queries after a packed past, against bf16 attention over the same tokens."""
    sizes, device, report = bench.sizes, bench.device, bench.report
    shape = sizes.prompt_shape
    where: dict[str, Any] = {"shape": shape.name, "batch": 1, "tokens": sizes.past + sizes.chunk}
    T, D = sizes.chunk, shape.head_dim
    query = random_numbers(shape.num_heads, T, D, device=device)
    laps: dict[str, Lap] = {}
    chosen: dict[str, Codes] = {}
    for codes in sizes.codes:
        if deadline.passed():
            report.add("prefill", "kvq", "us", "", "us", CUT, **where, **codes.columns)
            continue
        with report.guarded("prefill", "kvq", **where, **codes.columns):
            run, reference = _chunk(bench, codes, query)
            if _right(bench, run(), reference, where | codes.columns):
                laps[codes.name], chosen[codes.name] = [run], codes
    with report.guarded("prefill", "bf16", **where):
        for name, run in _bf16_chunk(bench, query).items():
            if isinstance(run, str):
                report.add("prefill", name, "us", "", "us", run, **where)
            else:
                laps[name] = [run]
    # Not captured: what a block of pages is seen by is sent to the device on the way.
    timings = race(laps, device=device, expired=deadline.passed, captured=False)
    plain = {name: timing for name, timing in timings.items() if name not in chosen}
    timed = [name for name in plain if plain[name].samples]
    best = min(timed, key=lambda name: plain[name].median, default=None)
    for name, timing in timings.items():
        cells = where | (chosen[name].columns if name in chosen else {})
        what = "kvq" if name in chosen else name
        report.add_timing("prefill", what, timing, note=f"{T} queries", **cells)
        if name in chosen and best is not None and timing.samples:
            ratio = plain[best].median / timing.median
            report.add("prefill", what, "times best bf16", ratio, "x", f"best is {best}", **cells)


def _right(
    bench: Bench, found: Tensor, reference: Callable[[], Tensor], cells: dict[str, Any]
) -> bool:
    """Whether a chunk is what the reference computes on the same device."""
    report = bench.report
    try:
        expected = reference()
    # The kernel may be right where plain torch cannot run: the checks before have compared them.
    except Exception as error:
        note = f"not compared at this size: {brief(error)}"
        report.add("prefill", "kvq", "relative error", "", "", note, **cells)
        return bool(found.isfinite().all())
    error = relative_error(found, expected)
    passed = error <= PREFILL_ERROR
    report.failures += not passed
    note = "" if passed else f"failed: beyond {PREFILL_ERROR}, not timed"
    report.add("prefill", "kvq", "relative error", error, "of the norm", note, **cells)
    return passed


def _chunk(
    bench: Bench, codes: Codes, query: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What attends over pages by kernels, and its reference; pages of the chunk are complete."""
    from kvq_kernels.prefill import KernelPages, attend

    sizes, device = bench.sizes, bench.device
    shape, T = sizes.prompt_shape, sizes.chunk
    H, D = shape.num_kv_heads, shape.head_dim
    layer = PackedLayerTables.of(shape, codes, device=device)
    held = sizes.past // PAGE_TOKENS
    P = held + (T - 1) // PAGE_TOKENS
    keys, values = (random_numbers(H, P * PAGE_TOKENS, D, device=device) for _ in range(2))
    key_pages, value_pages = layer.keys.pack(keys), layer.values.pack(values)
    first = SINKS + PAGE_TOKENS * torch.arange(P, dtype=torch.int32, device=device)
    key_pages.base_positions.copy_(first)
    lengths = [PAGE_TOKENS] * P
    ends = [SINKS + PAGE_TOKENS * (page + 1) - 1 for page in range(P)]
    start = SINKS + held * PAGE_TOKENS
    positions = torch.cat([torch.arange(SINKS), start + torch.arange(T)]).to(device)
    exact_keys, exact_values = (random_numbers(H, SINKS + T, D, device=device) for _ in range(2))
    exact = ExactTokens(
        keys=rotate(exact_keys, *layer.angles.cos_sin(positions)),
        values=exact_values,
        sinks=SINKS,
        start=start,
    )
    how: dict[str, Any] = {
        "index": start,
        "held_pages": held,
        "exact": exact,
        "recent_tokens": 0,
        "options": AttentionOptions(scaling=D**-0.5),
    }
    pages = KernelPages(
        key_pages=key_pages,
        value_pages=value_pages,
        ids=torch.arange(P, device=device),
        lengths=lengths,
        ends=ends,
        tables=layer.tables,
        phases=layer.phases,
        workspace=Workspace(),
    )
    plain = ReferencePages(
        key_pages, value_pages, layer.parameters, layer.config, layer.angles, lengths, ends
    )
    return (
        lambda: attend(query, pages=pages, **how),
        lambda: attention.attend(query.float(), pages=plain, **how),
    )


def _bf16_chunk(bench: Bench, query: Tensor) -> dict[str, Callable[[], Tensor] | str]:
    """SDPA of the last queries of a text, by everything that gets the mask right."""
    from torch.nn.attention.bias import causal_lower_right

    sizes, device = bench.sizes, bench.device
    shape, T = sizes.prompt_shape, sizes.chunk
    N = SINKS + sizes.past + T
    size = (1, shape.num_kv_heads, N, shape.head_dim)
    keys, values = (random_numbers(*size, device=device) for _ in range(2))
    repeated = [x.repeat_interleave(shape.group, 1) for x in (keys, values)]
    runs: dict[str, Callable[[], Tensor] | str] = {}
    for backend_name, backend in prefill_backends(device).items():
        for way, (k, v), how in (
            ("enable_gqa", (keys, values), {"enable_gqa": True}),
            ("repeated heads", repeated, {}),
        ):

            def run(
                q: Tensor = query[None],
                k: Tensor = k,
                v: Tensor = v,
                how: dict[str, Any] = how,
                backend: SDPBackend = backend,
            ) -> Tensor:
                mask = causal_lower_right(q.shape[2], k.shape[2])
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)

            name = f"sdpa {backend_name}, {way}"
            try:
                # Some backends align the mask with the first key, and would do much less.
                few = run(query[None, :, -32:], k[:, :, -96:], v[:, :, -96:])
                error = relative_error(few[0], _few(query[:, -32:], keys, values))
            # Backends refuse shapes and cards in many ways.
            except Exception as refused:
                runs[name] = f"refused: {brief(refused)}"
                continue
            runs[name] = run if error <= BF16_ERROR else f"wrong: relative error {error:.2g}"
    return runs


def _few(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last queries over the last 96 tokens, in f32."""
    group = query.shape[0] // keys.shape[1]
    k, v = (x[0, :, -96:].float().repeat_interleave(group, 0) for x in (keys, values))
    scores = query.float() @ k.mT * query.shape[-1] ** -0.5
    T = query.shape[1]
    above = torch.ones(T, 96, dtype=torch.bool, device=query.device).triu(96 - T + 1)
    return scores.masked_fill(above, -torch.inf).softmax(-1) @ v
