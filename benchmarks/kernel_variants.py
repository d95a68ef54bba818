#!/usr/bin/env python3
"""Compile the kernels for devices that are not here, and hold them to their budgets.

    python benchmarks/kernel_variants.py [--all] [--target TARGET] [--lower] [--json]

``kernel_budgets.csv`` has a row for each variant of a kernel and target: instructions for an
element of the cache over a whole decode (main kernel, side passes, merge), or for a number that
error feedback shapes when it is packed, bytes of stack, bytes of shared memory. Budgets only go
down. Rows that have ``ci`` set are compiled by the tests; ``--all`` compiles the others, too;
``--lower`` writes what was measured where it is less than the budget. Exit code 1 if a budget is
exceeded.

How often loops run: 128 k tokens of one row with 8 key/value heads, on 132 multiprocessors
(``decode_code.py``); side passes walk as far as outliers of the embedded model reach on average
(``outlier_runs.py``). Both branches of an ``if`` count.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from decode_code import Shape, issued, measure_decode, worst
from kernel_code import (
    BUDGETS,
    LIMITS,
    Budget,
    Measured,
    Target,
    check,
    read_budgets,
)
from kernel_signatures import code_of
from results_csv import write_csv
from triton import next_power_of_2

from kvq_kernels import pack, prefill
from kvq_kernels.dequantize_kernels import (
    add_key_outliers,
    add_value_outliers,
    dequantize_key_pages,
    dequantize_value_pages,
)
from kvq_kernels.pack_codes import pack_key_codes, pack_value_codes
from kvq_kernels.prefill_block import attend_block
from kvq_kernels.select_outliers import select_outliers
from kvq_kernels.shape_kernel import SHAPE_BLOCK, SHAPE_TOKENS, SHAPE_WARPS, shape_errors
from kvq_kernels.value_scales import value_scales


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
    return worst(codes, target)


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
    return worst(codes, target, (issued(keys, {}) + issued(values, {})) / (2 * 64 * D))


def measure_pack(shape: Shape, target: Target) -> Measured:
    """What packs a page: scales, targets of error feedback, codes, pools.

    Instructions are those of the targets alone, for each number, keys and values together: a number
    takes a step for each channel before it, in the other kernels a few, or as many as a page has
    outliers.
    """
    D = shape.head_dim
    codes_of = {"H": 8, "D": D, "CHANNELS": pack.CHANNELS, "OUTLIERS": True, "SHAPED": True}
    # Keys are targets already.
    read = {"numbers": "*bf16", "keys": "*fp32", "values": "*bf16", "center": "*fp32"}
    both: dict[str, Any] = {"target": target, "types": read}
    width = next_power_of_2(D)
    chunk = {"CAPACITY": 400, "CHUNK": pack.CHUNK}
    shape_of = {"H": 8, "D": D, "SHARING": 8, "OUTLIERS": True, "TOKENS": SHAPE_TOKENS}
    widths = {True: shape.key_bits, False: shape.value_bits}
    shaping = [
        code_of(
            shape_errors,
            {**shape_of, "BITS": bits, "KEYS": of_keys},
            warps=SHAPE_WARPS,
            options={"enable_fp_fusion": False},
            **both,
        )
        for of_keys, bits in widths.items()
    ]
    codes = [
        *shaping,
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
    # Blocks of channels, and in each those before it.
    blocks = math.ceil(D / SHAPE_BLOCK)
    trips = {"0": blocks, "0.0": (blocks - 1) / 2}
    steps = sum(issued(code, trips) for code in shaping)
    return worst(codes, target, steps / (2 * SHAPE_TOKENS * D))


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
