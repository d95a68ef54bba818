"""Instructions of a whole decode, from the code of its kernels: see ``kernel_variants.py``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_code import Budget, KernelCode, Measured, Target, instructions_per_element
from kernel_signatures import PAIRS, code_of
from triton import next_power_of_2

from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.outliers import key_pool_capacity, value_list_capacity
from kvq_kernels.decode_exact import EXACT_TILE, exact_splits
from kvq_kernels.decode_merge import MAXIMA_TILE, SPLIT_TILE, merge_splits
from kvq_kernels.decode_outliers import key_outlier_scores, value_outlier_sums
from kvq_kernels.decode_queries import TURN_PAGES, turn_queries
from kvq_kernels.decode_splits import decode_splits
from kvq_kernels.launch_table import decode_launch
from kvq_kernels.nvidia import key_outliers as nvidia_keys
from kvq_kernels.nvidia import value_outliers as nvidia_values
from kvq_kernels.nvidia.decode_pages import decode_pages
from kvq_kernels.nvidia.entry_counts import chunks
from kvq_kernels.nvidia.outlier_scratch import key_scratch, value_warps

RUNS = Path(__file__).resolve().parent / "results" / "outlier-runs.csv"
PAGES_OF_A_ROW = 512
"""128 k tokens."""

KV_HEADS = 8
MULTIPROCESSORS = 132
SHARED_TILES = ("16x16x8xf16", "4x64x8xf32")
"""Weights and scores of a page, all that the fast path passes through shared memory."""

SHARED_BYTES = 12320
"""These, and 32 bytes in which a factor of each head changes lanes: conversions of layouts add."""

WINDOW = 1 + PAGE_TOKENS
"""Exact tokens that there is room for: a sink and a page."""


@dataclass(frozen=True)
class Shape:
    """What a variant is compiled for; columns of the table.

    ``every_option``: a quarter of the channels rotated, positions that jump, a soft cap, learned
    sinks, a scale a head: what few models or caches have. ``fast``: the path in registers.
    """

    key_bits: int
    value_bits: int
    head_dim: int
    group: int
    outliers: bool
    every_option: bool
    fast: bool

    @classmethod
    def of(cls, budget: Budget) -> Shape:
        settings = budget.settings
        return cls(
            key_bits=int(settings["key_bits"]),
            value_bits=int(settings["value_bits"]),
            head_dim=int(settings["head_dim"]),
            group=int(settings["group"]),
            outliers=settings["outliers"] == "1",
            every_option=budget.variant == "every option",
            fast=budget.variant == "registers",
        )


def longest_run(kind: str, lanes: int) -> float:
    """Mean steps of a side pass, to one decimal."""
    with RUNS.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["pass"] == kind and r["lanes"] == str(lanes)]
    programs = sum(int(row["programs"]) for row in rows)
    return round(sum(int(r["longest_run"]) * int(r["programs"]) for r in rows) / programs, 1)


def measure_decode(shape: Shape, target: Target) -> Measured:
    """A whole decode: instructions for each number of the cache, worst stack and shared memory."""
    D, G = shape.head_dim, shape.group
    layer = {"head_dim": D, "rotary_dim": D, "group_size": G}
    main = decode_launch(
        "sm_90" if shape.fast else "", bits=(shape.key_bits, shape.value_bits), **layer
    )
    assert shape.fast == (main.path == "registers")
    splits = main.programs * MULTIPROCESSORS // KV_HEADS
    pages = PAGES_OF_A_ROW / splits
    lanes = target.warp_size
    tiles = -(-WINDOW // EXACT_TILE.value)
    half = D // 8 if shape.every_option else D // 2
    constants = {
        "HQ": KV_HEADS * G,
        "H": KV_HEADS,
        "G": G,
        "GROUP_WIDTH": next_power_of_2(G),
        "N": max(16 if target.is_amd else 8, next_power_of_2(G)),
        "D": D,
        "HALF": half,
        "HALF_TILE": max(16, next_power_of_2(half)),
        "REST_TILE": next_power_of_2(D - 2 * half) if 2 * half < D else 0,
        "D_TILE": next_power_of_2(D),
        "K_BITS": shape.key_bits,
        "V_BITS": shape.value_bits,
        "CHANNEL_BITS": (D - 1).bit_length(),
        "SCALE_HEADS": KV_HEADS if shape.every_option else 1,
        "EXACT_SPLITS": tiles,
        "PART": lanes,
        "SOFTCAP": shape.every_option,
        "SINK_LOGITS": shape.every_option,
        "KEY_OUTLIERS": shape.outliers,
        "VALUE_OUTLIERS": shape.outliers,
        "IRREGULAR": shape.every_option,
        "BY_CHANNEL": shape.outliers or not shape.fast,
        "BY_HEAD": shape.fast,
        "PRECISION": "ieee" if target.is_amd else "tf32",
    }

    def code(kernel: Any, warps: int, *, stages: int = 3, **more: Any) -> KernelCode:
        known = {**constants, **more}
        taken = {name: known[name] for name in kernel.arg_names if name in known}
        types = PAIRS if kernel is decode_pages else {}
        return code_of(kernel, taken, target=target, warps=warps, stages=stages, types=types)

    # Of one program of the main kernel, and what falls to it of the others.
    codes = [code(turn_queries, 1), code(exact_splits, 4), code(merge_splits, 4)]
    turn, exact, merge = codes
    turned = TURN_PAGES.value
    total = (
        pages / turned * issued(turn, _rounds(turn, turned)) + issued(exact, {}) * tiles / splits
    )
    merged = splits + tiles
    rounds = {"0": -(-merged // MAXIMA_TILE.value), "1": -(-merged // SPLIT_TILE.value)}
    total += issued(merge, rounds) * G / splits
    if shape.fast:
        codes.append(code(decode_pages, main.warps))
        held = (codes[-1].shared_tiles, codes[-1].shared_bytes)
        if held != (SHARED_TILES, SHARED_BYTES):
            raise ValueError(
                f"decode_pages has {held} in shared memory, expected its scores and weights, "
                f"{(SHARED_TILES, SHARED_BYTES)}: keys and values stay in registers"
            )
        inner = [loop.name for loop in codes[-1].nest.loops if loop.name != "0"]
        assert inner == ["0.0"], "one loop over pages, and one over planes of keys"
        total += issued(codes[-1], {"0": pages, "0.0": shape.key_bits})
    else:
        codes.append(code(decode_splits, main.warps, stages=1))
        total += issued(codes[-1], {"0": pages})
    if shape.outliers and shape.fast:
        config = KVQConfig.create(key_bits=shape.key_bits, value_bits=shape.value_bits)
        pool = key_pool_capacity(config, D)
        room = value_list_capacity(config, KV_HEADS, D)
        width = next_power_of_2(G)
        scratch = key_scratch(1, KV_HEADS, width, D, pool, max_pages=PAGES_OF_A_ROW, splits=splits)
        programs = scratch["key_sums"][0][2] / splits
        warps = value_warps(room)
        keys = code(nvidia_keys.key_outlier_scores, 1, CAPACITY=pool)
        values = code(nvidia_values.value_outlier_sums, warps, CAPACITY=room)
        codes += [keys, values]
        total += programs * issued(keys, _chunks(keys, pages / programs, pool))
        total += issued(values, _chunks(values, -(-pages // warps), room))
    elif shape.outliers:
        keys = code(key_outlier_scores, 1, CAPACITY=4 * D)
        values = code(value_outlier_sums, 1, CAPACITY=400)
        codes += [keys, values]
        steps = _walk(keys, PAGE_TOKENS // lanes, longest_run("keys", lanes))
        total += pages * issued(keys, steps)
        steps = _walk(values, pages, longest_run("values", lanes))
        total += issued(values, steps) * D / lanes
    return worst(codes, target, total / (pages * PAGE_TOKENS * 2 * D))


def issued(code: KernelCode, trips: Mapping[str, float]) -> float:
    """Thread-instructions of a program."""
    return instructions_per_element(code.nest, trips, elements=1, threads=code.threads)


def _chunks(code: KernelCode, pages: float, entries: int) -> dict[str, float]:
    """Trips of a loop over pages, and of one over chunks of their outliers, if any."""
    inner = [loop.name for loop in code.nest.loops if loop.name != "0"]
    return {"0": pages, **dict.fromkeys(inner, chunks(entries))}


def _rounds(code: KernelCode, rounds: float) -> dict[str, float]:
    """Trips of a loop; if it was unrolled, the loop over what is left counts for all."""
    names = [loop.name for loop in code.nest.loops]
    return {name: rounds if name == names[-1] else 0.0 for name in names}


def _walk(code: KernelCode, outer: float, steps: float) -> dict[str, float]:
    """Trips of a loop of ``outer`` rounds around a walk of ``steps``, as the compiler left them.

    Where it unrolled the walk, the loop over what is left counts for all steps; where it unrolled
    the rounds, there are as many walks.
    """
    names = [loop.name for loop in code.nest.loops]
    walks = [name for name in names if "." in name]
    if not walks:
        assert len(names) == outer, code.nest
        return dict.fromkeys(names, steps)
    return {"0": outer, **{name: steps if name == walks[-1] else 0.0 for name in walks}}


def worst(codes: Sequence[KernelCode], target: Target, instructions: float = 0.0) -> Measured:
    """Instructions as given, and the most stack and shared memory that a kernel takes."""
    return Measured(
        target=target,
        instructions_per_element=instructions,
        stack_bytes=max(code.stack_bytes for code in codes),
        shared_bytes=max(code.shared_bytes for code in codes),
    )
