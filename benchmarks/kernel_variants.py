#!/usr/bin/env python3
"""Compile the kernels for devices that are not here, and hold them to their budgets.

    python benchmarks/kernel_variants.py [--all] [--target TARGET] [--lower] [--json]

``kernel_budgets.csv`` has a row for each variant of a kernel and target: instructions for an
element of the cache over a whole decode (main kernel, side passes, merge), bytes of stack, bytes of
shared memory. Budgets only go down. Rows that have ``ci`` set are compiled by the tests; ``--all``
compiles the others, too; ``--lower`` writes what was measured where it is less than the budget.
Exit code 1 if a budget is exceeded.

How often loops run, for one program of the main kernel: ``PAGES`` pages; the side passes walk as
far as outliers of the embedded model reach on average (``outlier_runs.py``); the merge of a head is
shared by ``SPLITS`` programs. Both branches of an ``if`` count, so that a program of pages is
charged for exact tokens, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernel_code import (
    BUDGETS,
    LIMITS,
    Budget,
    KernelCode,
    Measured,
    Target,
    check,
    instructions_per_element,
    read_budgets,
)
from kernel_signatures import code_of
from results_csv import write_csv
from triton import next_power_of_2

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels import pack, prefill
from kvq_kernels.decode import MAIN_WARPS
from kvq_kernels.decode_merge import SPLIT_TILE, merge_splits
from kvq_kernels.decode_outliers import key_outlier_scores, value_outlier_sums
from kvq_kernels.decode_queries import turn_queries
from kvq_kernels.decode_splits import EXACT_TILE, decode_splits
from kvq_kernels.dequantize_kernels import (
    add_key_outliers,
    add_value_outliers,
    dequantize_key_pages,
    dequantize_value_pages,
)
from kvq_kernels.pack_codes import pack_key_codes, pack_value_codes
from kvq_kernels.prefill_block import attend_block
from kvq_kernels.select_outliers import select_outliers
from kvq_kernels.value_scales import value_scales

RUNS = Path(__file__).resolve().parent / "results" / "outlier-runs.csv"
PAGES = 16
"""Pages of a program: 128 k tokens of one row with 8 key/value heads on 132 multiprocessors."""

SPLITS = 33
WINDOW = 1 + PAGE_TOKENS
"""Exact tokens that there is room for: a sink and a page."""


@dataclass(frozen=True)
class Shape:
    """What a variant is compiled for; columns of the table.

    ``every_option``: a quarter of the channels rotated, positions that jump, a soft cap, learned
    sinks, a scale a head: what few models or caches have.
    """

    key_bits: int
    value_bits: int
    head_dim: int
    group: int
    outliers: bool
    every_option: bool

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
    lanes = target.warp_size
    exact_splits = -(-WINDOW // EXACT_TILE.value)
    half = D // 8 if shape.every_option else D // 2
    constants = {
        "HQ": 8 * G,
        "H": 8,
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
        "SCALE_HEADS": 8 if shape.every_option else 1,
        "EXACT_SPLITS": exact_splits,
        "PART": lanes,
        "SOFTCAP": shape.every_option,
        "SINK_LOGITS": shape.every_option,
        "KEY_OUTLIERS": shape.outliers,
        "VALUE_OUTLIERS": shape.outliers,
        "IRREGULAR": shape.every_option,
        "PRECISION": "ieee" if target.is_amd else "tf32",
    }

    def code(kernel: Any, warps: int, *, stages: int = 3, **more: Any) -> KernelCode:
        known = {**constants, **more}
        taken = {name: known[name] for name in kernel.arg_names if name in known}
        return code_of(kernel, taken, target=target, warps=warps, stages=stages)

    turn = code(turn_queries, 1)
    splits = code(decode_splits, MAIN_WARPS, stages=1)
    merge = code(merge_splits, 4)
    codes = [turn, splits, merge]
    total = PAGES * _issued(turn, {}) + _issued(splits, {"0": PAGES})
    tiles = -(-(SPLITS + exact_splits) // SPLIT_TILE.value)
    total += _issued(merge, {"0": tiles}) * G / SPLITS
    if shape.outliers:
        keys = code(key_outlier_scores, 1, CAPACITY=4 * D)
        values = code(value_outlier_sums, 1, CAPACITY=400)
        codes += [keys, values]
        steps = _walk(keys, PAGE_TOKENS // lanes, longest_run("keys", lanes))
        total += PAGES * _issued(keys, steps)
        steps = _walk(values, PAGES, longest_run("values", lanes))
        total += _issued(values, steps) * D / lanes
    return _worst(codes, target, total / (PAGES * PAGE_TOKENS * 2 * D))


def _issued(code: KernelCode, trips: Mapping[str, float]) -> float:
    return instructions_per_element(code.nest, trips, elements=1, threads=code.threads)


def _walk(code: KernelCode, outer: int, steps: float) -> dict[str, float]:
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


def measure_prefill(shape: Shape, target: Target) -> Measured:
    """Prefill attention over decoded pages, with masks and without, and over exact tokens."""
    D_TILE = next_power_of_2(shape.head_dim)
    codes = []
    exactly = "ieee" if target.is_amd else "tf32"
    for precision, masked in (("half", False), ("half", True), (exactly, True)):
        cut = prefill.tiles(D_TILE, precision, amd=target.is_amd)
        exact = {"keys": "*fp32", "values": "*bf16"} if precision != "half" else {}
        codes.append(
            code_of(
                attend_block,
                {
                    "H": 8,
                    "G": shape.group,
                    "D": shape.head_dim,
                    "D_TILE": D_TILE,
                    "ROW_TILE": cut["ROW_TILE"],
                    "TOKEN_TILE": cut["TOKEN_TILE"],
                    "MASKED": masked,
                    "LAST": precision != "half",
                    "SOFTCAP": False,
                    "SINK_LOGITS": False,
                    "PRECISION": precision,
                },
                target=target,
                warps=cut["num_warps"],
                stages=cut["num_stages"],
                types=exact,
            )
        )
    return _worst(codes, target)


def measure_dequantize(shape: Shape, target: Target) -> Measured:
    """Pages to f16, keys rotated, and their outliers; instructions of the dense part."""
    D = shape.head_dim
    dense = {"H": 8, "D": D, "WIDE": False}
    rotary = {"HALF": D // 2, "IRREGULAR": False}
    half: dict[str, Any] = {"target": target, "types": {"output": "*fp16"}}
    warps = 4 if D <= 128 else 8
    keys = code_of(
        dequantize_key_pages,
        {**dense, **rotary, "HALF_TILE": next_power_of_2(D // 2), "REST_TILE": 0,
         "BITS": shape.key_bits},
        warps=warps, **half,
    )  # fmt: skip
    tile = {"D_TILE": next_power_of_2(D), "SCALE_HEADS": 1}
    values = code_of(
        dequantize_value_pages, {**dense, **tile, "BITS": shape.value_bits}, warps=warps, **half
    )
    codes = [keys, values]
    if shape.outliers:
        pool = {"H": 8, "D": D, "CAPACITY": 4 * D}
        channel_bits = (D - 1).bit_length()
        codes += [
            code_of(
                add_key_outliers,
                {**pool, **rotary, "CHANNEL_BITS": channel_bits, "SECOND": second},
                warps=4, **half,
            )
            for second in (False, True)
        ]  # fmt: skip
        codes.append(code_of(add_value_outliers, {**pool, **tile}, warps=4, **half))
    return _worst(codes, target, (_issued(keys, {}) + _issued(values, {})) / (2 * 64 * D))


def measure_pack(shape: Shape, target: Target) -> Measured:
    """What packs a page: scales, codes, pools."""
    D = shape.head_dim
    codes_of = {"H": 8, "D": D, "CHANNELS": pack.CHANNELS, "OUTLIERS": True}
    bf16 = {"keys": "*bf16", "values": "*bf16", "center": "*fp32"}
    both: dict[str, Any] = {"target": target, "types": bf16}
    width = next_power_of_2(D)
    chunk = {"CAPACITY": 400, "CHUNK": pack.CHUNK}
    codes = [
        code_of(
            pack_key_codes,
            {**codes_of, "BITS": shape.key_bits, "INDEX_BITS": (D - 1).bit_length()},
            warps=pack.CODE_WARPS, **both,
        ),
        code_of(
            pack_value_codes,
            {**codes_of, "BITS": shape.value_bits, "INDEX_BITS": 8, "SHARING": 8},
            warps=pack.CODE_WARPS, **both,
        ),
        code_of(
            value_scales,
            {"D": D, "SHARING": 8, "PER_SIDE": 5, "TOKENS": 1, "LOW_BIT": 16,
             "PLACE_BITS": (8 * D - 1).bit_length()},
            warps=1, **both,
        ),
        code_of(
            select_outliers,
            {**chunk, "ROWS": 256, "COLUMNS": D, "OFFSETS": False, "WIDTH": width,
             "CHUNK_ROWS": pack.CHUNK // width},
            warps=pack.SELECT_WARPS, **both,
        ),
    ]  # fmt: skip
    return _worst(codes, target)


def _worst(codes: Sequence[KernelCode], target: Target, instructions: float = 0.0) -> Measured:
    return Measured(
        target=target,
        instructions_per_element=instructions,
        stack_bytes=max(code.stack_bytes for code in codes),
        shared_bytes=max(code.shared_bytes for code in codes),
    )


MEASURES: dict[str, Callable[[Shape, Target], Measured]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "dequantize": measure_dequantize,
    "pack": measure_pack,
}


def measure(budget: Budget) -> Measured:
    """Compile what a row of the table is about."""
    return MEASURES[budget.kernel](Shape.of(budget), budget.target)


def lower_budgets(measured: Mapping[str, Measured]) -> None:
    """Write smaller limits to the table: instructions rounded up to a tenth, bytes as they are."""
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for budget, row in zip(read_budgets(), rows, strict=True):
        if (found := measured.get(str(budget))) is None:
            continue
        instructions = math.ceil(10 * found.instructions_per_element) / 10
        used = (instructions or "", found.stack_bytes, found.shared_bytes)
        for name, use in zip(LIMITS, used, strict=True):
            if use != "" and (row[name] == "" or float(row[name]) > float(use)):
                row[name] = str(use)
    write_csv(BUDGETS, rows)


def main() -> int:
    """Print what each variant takes, and what exceeds its budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="variants that CI leaves out, too")
    parser.add_argument("--target", choices=[*Target])
    parser.add_argument("--lower", action="store_true", help="lower the budgets")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report, violations = [], []
    lowered: dict[str, Measured] = {}
    for budget in read_budgets():
        if not options.all and budget.settings["ci"] != "1":
            continue
        if options.target not in (None, budget.target):
            continue
        measured = lowered[str(budget)] = measure(budget)
        found = check(measured, budget)
        violations += found
        report.append({"variant": str(budget), **asdict(measured)})
        if not options.json:
            print(
                f"{budget}: {measured.instructions_per_element:.2f} instructions an element, "
                f"stack {measured.stack_bytes}, shared {measured.shared_bytes}"
            )
    if options.lower:
        lower_budgets(lowered)
    if options.json:
        print(json.dumps({"variants": report, "violations": violations}))
    for violation in violations:
        print(violation, file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
