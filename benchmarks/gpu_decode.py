"""Decode steps: the packed cache against the best bf16 attention of the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bf16_decode import CUTS, Bf16Decode, Cut
from gpu_baselines import Attention, decode_baselines, dense_reference, relative_error
from gpu_cases import PackedLayerTables, cache_bytes, packed_rows, random_numbers
from gpu_paths import cold_copies, kvq_lap, path_of, portably
from gpu_report import CUT, Deadline, say
from gpu_shapes import Bench, Codes, DecodeCase
from gpu_timing import Lap, brief, copies_of, race
from torch import Tensor

from kvq_kernels import decode_reference
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.packed_rows import PackedRows

PART = "decode"
KVQ_ERROR = 5e-3
"""Relative to the reference in f32: some ten roundings to 16 bits, of 2**-11 at most each."""

BF16_ERROR = 2e-2
TUNING_ROUNDS = 2


def run(bench: Bench, deadline: Deadline) -> None:
    """All cases, most important first."""
    for case in bench.sizes.cases:
        if deadline.passed():
            bench.report.add(PART, "all", "us", "", "us", CUT, **case.columns)
            continue
        say(f"decode: {case.shape.name}, {case.batch} x {case.tokens}")
        with bench.report.guarded(PART, "all", **case.columns):
            _measure(bench, case, deadline)
        bench.report.write()


def _measure(bench: Bench, case: DecodeCase, deadline: Deadline) -> None:
    shape, device, report = case.shape, bench.device, bench.report
    size = (case.batch, shape.num_kv_heads, case.tokens, shape.head_dim)
    query = random_numbers(case.batch, shape.num_heads, shape.head_dim, device=device)
    keys, values = (random_numbers(*size, device=device) for _ in range(2))
    plain_bytes = keys.nbytes + values.nbytes
    laps: dict[str, Lap] = {}
    sizes: dict[str, int] = {}
    notes: dict[str, str] = {}
    chosen: dict[str, tuple[str, Codes]] = {}
    for codes in bench.sizes.codes:
        if codes.bits not in case.bits:
            continue
        with report.guarded(PART, "kvq", **case.columns, **codes.columns):
            layer = PackedLayerTables.of(shape, codes, device=device)
            rows = packed_rows(layer, keys, values)
            copies = cold_copies(rows)
            ways = [("kvq", kvq_lap(layer, query, copies))]
            path, _ = path_of(ways[0][1][0])
            if case.both_paths and path != "portable":
                ways.append(("kvq, portable", [portably(x) for x in kvq_lap(layer, query, copies)]))
            for what, lap in ways:
                if not _right(bench, case, codes, what, lap[0](), (layer, query, rows)):
                    continue
                name = codes.name.replace("kvq", what, 1)
                laps[name], sizes[name] = lap, cache_bytes(rows)
                chosen[name] = what, codes
                notes[name] = f"{path if what == 'kvq' else 'portable'} path"

    plain = [(keys, values)]
    plain += [
        (keys.clone(), values.clone()) for _ in range(copies_of(plain_bytes, device=device) - 1)
    ]
    expected = dense_reference(query, keys, values)
    found = decode_baselines(batch=case.batch, group=shape.group, device=device)
    for name, attention in [
        *found,
        ("triton split-KV", tuned_decode(query, plain, device, expected)),
    ]:
        usable = _checked(attention, query, plain[0], expected)
        if isinstance(usable, str):
            report.add(PART, name, "us", "", "us", usable, **case.columns)
            continue
        laps[name] = [_bound(usable, query, *copy) for copy in plain]
        notes[name] = getattr(usable, "note", "")
        sizes[name] = plain_bytes
    timings = race(laps, device=device, expired=deadline.passed)
    best = min(
        (name for name in timings if name not in chosen and timings[name].samples),
        key=lambda name: timings[name].median,
        default=None,
    )
    elements = 2 * case.batch * shape.num_kv_heads * case.tokens * shape.head_dim
    for name, timing in timings.items():
        cells: dict[str, Any] = dict(case.columns)
        what = name
        if name in chosen:
            what, codes = chosen[name]
            cells |= codes.columns
        report.add_timing(PART, what, timing, note=notes.get(name, ""), **cells)
        if not timing.samples:
            continue
        seconds = timing.median
        report.add(PART, what, "elements", elements / seconds / 1e9, "1e9/s", **cells)
        report.add(PART, what, "bandwidth", sizes[name] / seconds / 1e9, "GB/s", **cells)
        per_token = sizes[name] / case.batch / case.tokens
        report.add(PART, what, "bytes a token", per_token, "B", **cells)
        if name in chosen and best is not None:
            ratio = timings[best].median / seconds
            report.add(PART, what, "times best bf16", ratio, "x", f"best is {best}", **cells)
        other = timings.get(name.replace("kvq", "kvq, portable", 1)) if what == "kvq" else None
        if other is not None and other.samples:
            report.add(PART, what, "times portable", other.median / seconds, "x", **cells)


def _right(
    bench: Bench,
    case: DecodeCase,
    codes: Codes,
    what: str,
    found: Tensor,
    given: tuple[PackedLayerTables, Tensor, PackedRows],
) -> bool:
    """Whether a step at its full size is what the reference computes on the same device."""
    report, cells = bench.report, case.columns | codes.columns
    layer, query, rows = given
    options = AttentionOptions(scaling=query.shape[-1] ** -0.5)
    try:
        expected = decode_reference.decode(
            query.float(), rows, layer.tables, layer.angles, options=options
        )
    # The kernel may be right where plain torch cannot run: the checks before have compared them.
    except Exception as error:
        note = f"not compared at this size: {brief(error)}"
        report.add(PART, what, "relative error", "", "", note, **cells)
        return bool(found.isfinite().all())
    error = relative_error(found, expected)
    passed = error <= KVQ_ERROR
    report.failures += not passed
    note = "" if passed else f"failed: beyond {KVQ_ERROR}, not timed"
    report.add(PART, what, "relative error", error, "of the norm", note, **cells)
    return passed


def _bound(attention: Attention, query: Tensor, keys: Tensor, values: Tensor) -> Callable:
    return lambda: attention(query, keys, values)


def _checked(
    attention: Attention | str, query: Tensor, copy: tuple[Tensor, Tensor], expected: Tensor
) -> Attention | str:
    """What is given if it computes the same, else why not."""
    if isinstance(attention, str):
        return attention
    try:
        error = relative_error(attention(query, *copy), expected)
    # Backends refuse shapes and cards in many ways; each is a row, none ends the benchmark.
    except Exception as refused:
        return f"refused: {brief(refused)}"
    return attention if error <= BF16_ERROR else f"wrong: relative error {error:.2g}"


class _TritonDecode:
    """``Bf16Decode`` as an ``Attention``; ``note`` says how it is cut."""

    def __init__(self, cut: Cut, lengths: Tensor) -> None:
        self._decode, self._lengths = Bf16Decode(cut), lengths
        self.note = (
            f"tile {cut.tile}, {cut.num_warps} warps, {cut.num_stages} stages, {cut.waves} waves"
        )

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self._decode(query, keys, values, self._lengths)

    def over(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """The same over the first ``lengths`` tokens, i32 ``[B]``, of each row."""
        return self._decode(query, keys, values, lengths)


def tuned_decode(
    query: Tensor, plain: list[tuple[Tensor, Tensor]], device: torch.device, expected: Tensor
) -> Attention | str:
    """The fastest cut for this shape, by a short race."""
    keys = plain[0][0]
    lengths = torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int32, device=device)
    cuts = CUTS if device.type == "cuda" else CUTS[:1]
    candidates = {str(place): _TritonDecode(cut, lengths) for place, cut in enumerate(cuts)}
    usable = {
        name: one
        for name, one in candidates.items()
        if not isinstance(_checked(one, query, plain[0], expected), str)
    }
    if not usable:
        return candidates["0"]  # is checked again, and says what is wrong
    laps = {name: [_bound(one, query, *copy) for copy in plain] for name, one in usable.items()}
    timings = race(laps, device=device, rounds=TUNING_ROUNDS)
    timed = [name for name in timings if timings[name].samples]
    return usable[min(timed, key=lambda name: timings[name].median)] if timed else candidates["0"]
