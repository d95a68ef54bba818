#!/usr/bin/env python3
"""Compile the kernels for devices that are not here, and hold them to their budgets.

    python benchmarks/kernel_variants.py [--all] [--json]

``kernel_budgets.csv`` has a row for each variant of a kernel and target: instructions for an
element of the cache over a whole decode (main kernel, side passes, merge), bytes of stack, bytes of
shared memory. Budgets only go down. Rows that have ``ci`` set are compiled by the tests; ``--all``
compiles the others, too. Exit code 1 if a budget is exceeded.

How often loops run, for one program of the main kernel: ``PAGES`` pages; the side passes walk as
far as outliers of the embedded model reach on average (``outlier_runs.py``); the merge of a head is
shared by ``SPLITS`` programs. Both branches of an ``if`` count, so that a program of pages is
charged for exact tokens, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernel_code import (
    Budget,
    KernelCode,
    Measured,
    Target,
    check,
    compile_kernel,
    instructions_per_element,
    read_budgets,
    read_code,
)
from triton import next_power_of_2

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.decode import MAIN_WARPS
from kvq_kernels.decode_merge import SPLIT_TILE, merge_splits
from kvq_kernels.decode_outliers import key_outlier_scores, value_outlier_sums
from kvq_kernels.decode_splits import EXACT_TILE, decode_splits

RUNS = Path(__file__).resolve().parent / "results" / "outlier-runs.csv"
PAGES = 16
"""Pages of a program: 128 k tokens of one row with 8 key/value heads on 132 multiprocessors."""

SPLITS = 33
WINDOW = 1 + PAGE_TOKENS
"""Exact tokens that there is room for: a sink and a page."""

TYPES = {
    "query": "*bf16", "key_words": "*i32", "key_half_range": "*fp16", "key_center": "*fp16",
    "key_table": "*i32", "value_words": "*i32", "value_scales": "*fp16", "value_table": "*i32",
    "block_table": "*i32", "lengths": "*i32", "base_positions": "*i32",
    "irregular_positions": "*i32", "phase_high": "*i32", "phase_low": "*i32",
    "offset_cos": "*fp16", "offset_sin": "*fp16", "exact_keys": "*bf16", "exact_values": "*bf16",
    "exact_positions": "*i32", "weights": "*fp16", "group_max": "*fp32", "split_out": "*fp32",
    "split_max": "*fp32", "split_sum": "*fp32", "table_width": "i32", "weight_tokens": "i32",
    "exact_room": "i32", "score_scale": "fp32", "softcap": "fp32", "rotary_scaling": "fp32",
    "pools": "*i16", "counts": "*u8", "half_range": "*fp32", "residual_step": "fp32",
    "lists": "*i16", "offsets": "*u16", "scales": "*fp16", "sink_logits": "*fp32",
    "output": "*fp32", "splits": "i32",
}  # fmt: skip
"""Arguments of kernels in a bf16 model."""


@dataclass(frozen=True)
class Shape:
    """What a variant is compiled for; columns of the table."""

    key_bits: int
    value_bits: int
    head_dim: int
    group: int
    outliers: bool

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Shape:
        return cls(
            key_bits=int(settings["key_bits"]),
            value_bits=int(settings["value_bits"]),
            head_dim=int(settings["head_dim"]),
            group=int(settings["group"]),
            outliers=settings["outliers"] == "1",
        )


def code_of(
    kernel: Any, constexprs: Mapping[str, Any], *, target: Target, warps: int, stages: int = 3
) -> KernelCode:
    """Compile a kernel whose other arguments have the types of ``TYPES``."""
    signature = {name: TYPES[name] for name in kernel.arg_names if name not in constexprs}
    aligned = [n for n, t in signature.items() if t.startswith("*") or n == "weight_tokens"]
    return read_code(
        compile_kernel(
            kernel,
            signature,
            constexprs,
            divisible=aligned,
            target=target,
            num_warps=warps,
            num_stages=stages,
        )
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
    smallest = 16 if target is Target.HIP_GFX942 else 8
    exact_splits = -(-WINDOW // EXACT_TILE.value)
    three = 3 in (shape.key_bits, shape.value_bits)
    heads = {"H": 8, "G": G}
    main = code_of(
        decode_splits,
        {
            **heads,
            "N": max(smallest, next_power_of_2(G)),
            "D": D,
            "HALF": D // 2,
            "HALF_TILE": next_power_of_2(D // 2),
            "REST_TILE": 0,
            "D_TILE": next_power_of_2(D),
            "K_BITS": shape.key_bits,
            "V_BITS": shape.value_bits,
            "SCALE_HEADS": 1,
            "EXACT_SPLITS": exact_splits,
            "SOFTCAP": False,
            "KEY_OUTLIERS": shape.outliers,
            "VALUE_OUTLIERS": shape.outliers,
            "IRREGULAR": False,
            "PRECISION": "tf32",
        },
        target=target,
        warps=MAIN_WARPS,
        stages=1,
    )
    merge = code_of(
        merge_splits,
        {"HQ": 8 * G, "G": G, "D": D, "D_TILE": next_power_of_2(D), "SINK_LOGITS": False},
        target=target,
        warps=4,
    )
    codes = [main, merge]
    total = _issued(main, {"0": PAGES, "0.0": 3 if three else 4})
    tiles = -(-(SPLITS + exact_splits) // SPLIT_TILE.value)
    total += _issued(merge, {"0": tiles}) * G / SPLITS
    if shape.outliers:
        side = {**heads, "N": next_power_of_2(G), "D": D, "PART": lanes}
        keys = code_of(
            key_outlier_scores,
            {**side, "HALF": D // 2, "CAPACITY": 4 * D, "CHANNEL_BITS": (D - 1).bit_length()},
            target=target,
            warps=1,
        )
        values = code_of(
            value_outlier_sums,
            {**side, "CAPACITY": 400, "SCALE_HEADS": 1, "EXACT_SPLITS": exact_splits},
            target=target,
            warps=1,
        )
        codes += [keys, values]
        steps = _walk(keys, "", longest_run("keys", lanes))
        total += _issued(keys, steps) * PAGES * PAGE_TOKENS / lanes
        steps = {"0": PAGES, **_walk(values, "0.", longest_run("values", lanes))}
        total += _issued(values, steps) * D / lanes
    return Measured(
        target=target,
        instructions_per_element=total / (PAGES * PAGE_TOKENS * 2 * D),
        stack_bytes=max(code.stack_bytes for code in codes),
        shared_bytes=max(code.shared_bytes for code in codes),
    )


def _issued(code: KernelCode, trips: Mapping[str, float]) -> float:
    return instructions_per_element(code.nest, trips, elements=1, threads=code.threads)


def _walk(code: KernelCode, parent: str, steps: float) -> dict[str, float]:
    """Trips of the loop below ``parent``; where the compiler unrolled it, of what is left over."""
    names = [loop.name for loop in code.nest.loops if loop.name.rpartition(".")[0] == parent[:-1]]
    return {name: steps if name == names[-1] else 0.0 for name in names}


MEASURES: dict[str, Callable[[Shape, Target], Measured]] = {"decode": measure_decode}


def measure(budget: Budget) -> Measured:
    """Compile what a row of the table is about."""
    return MEASURES[budget.kernel](Shape.of(budget.settings), budget.target)


def main() -> int:
    """Print what each variant takes, and what exceeds its budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="variants that CI leaves out, too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report, violations = [], []
    for budget in read_budgets():
        if not options.all and budget.settings["ci"] != "1":
            continue
        measured = measure(budget)
        found = check(measured, budget)
        violations += found
        report.append({"variant": str(budget), **asdict(measured)})
        if not options.json:
            print(
                f"{budget}: {measured.instructions_per_element:.2f} instructions an element, "
                f"stack {measured.stack_bytes}, shared {measured.shared_bytes}"
            )
    if options.json:
        print(json.dumps({"variants": report, "violations": violations}))
    for violation in violations:
        print(violation, file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
