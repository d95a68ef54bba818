#!/usr/bin/env python3
"""What limits the fast path of decoding, as far as code tells: instructions of its parts alone.

    python benchmarks/decode_ceilings.py [--json] [-o CSV]

Unpacking, keys, values (``ceiling_kernels``) and all of ``decode_pages``, compiled for sm_80 and
sm_90 at D = 128 and G = 4. Instructions are thread-instructions of a program for each number of the
cache, keys and values together, so that the rows of keys and values are parts of the row of all;
loops run as in ``decode_code``. ``lookups`` are byte permutes and ``loads`` are loads from global
memory among them: they show that a part does what the whole does. These are counts;
``bench_gpu.py --only ceilings`` has the times, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ceiling_kernels import score_pages, unpack_pages, weigh_pages
from decode_code import KV_HEADS, MULTIPROCESSORS, PAGES_OF_A_ROW
from kernel_code import KernelCode, Target, instructions_by_pipe
from kernel_signatures import PAIRS, code_of
from loop_nest import Instruction, Loop, LoopNest
from results_csv import commit, write_csv

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.launch_table import decode_launch
from kvq_kernels.nvidia.decode_pages import decode_pages

DEFAULT_CSV = Path(__file__).resolve().parent / "results" / "decode-ceilings.csv"
D, G = 128, 4
BITS = (2, 3, 4)
TARGETS = (Target.CUDA_80, Target.CUDA_90)
PIPES = ("alu", "fma", "tensor", "memory", "stack", "other")
FOLDED = {"unpack": "*i32", "keys": "*fp32", "values": "*fp32"}
"""Type of what each part leaves."""

STAGES: Mapping[str, tuple[Any, bool]] = {
    "unpack": (unpack_pages, False),
    "keys": (score_pages, False),
    "values": (weigh_pages, False),
    "all": (decode_pages, False),
    "all, outliers": (decode_pages, True),
}
"""Kernels, and whether they meet outliers of keys and of values."""


def stage_code(stage: str, bits: int, target: Target) -> KernelCode:
    """Compile a part for 128 k tokens of one row; keys and values have as many bits."""
    kernel, outliers = STAGES[stage]
    constants = {
        "H": KV_HEADS,
        "G": G,
        "GROUP_WIDTH": G,
        "D": D,
        "K_BITS": bits,
        "V_BITS": bits,
        "SCALE_HEADS": 1,
        # Numbers only move addresses here.
        "EXACT_SPLITS": 1,
        "SOFTCAP": False,
        "KEY_OUTLIERS": outliers,
        "VALUE_OUTLIERS": outliers,
    }
    return code_of(
        kernel,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        target=target,
        warps=1,
        types={**PAIRS, "folded": FOLDED.get(stage, "")},
    )


def measure_stage(stage: str, bits: int, target: Target) -> dict[str, object]:
    """A row: instructions for each number by pipe, lookups and loads, registers, stack, memory."""
    code = stage_code(stage, bits, target)
    launch = decode_launch(
        f"sm_{target.value[-2:]}", bits=(bits, bits), head_dim=D, rotary_dim=D, group_size=G
    )
    pages = PAGES_OF_A_ROW / (launch.programs * MULTIPROCESSORS // KV_HEADS)
    loops = [loop.name for loop in code.nest.loops]
    # A page each; inside, planes of keys.
    trips = {name: bits if "." in name else pages for name in loops}
    how: dict[str, Any] = {"elements": pages * PAGE_TOKENS * 2 * D, "threads": code.threads}
    pipes = instructions_by_pipe(code.nest, trips, **how)
    counted = {
        name: sum(instructions_by_pipe(_only(code.nest, opcode), trips, **how).values())
        for name, opcode in (("lookups", "PRMT"), ("loads", "LDG"))
    }
    return {
        "target": target.value,
        "bits": bits,
        "stage": stage,
        "instructions": sum(pipes.values()),
        **{pipe: pipes.get(pipe, 0.0) for pipe in PIPES},
        **counted,
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
    }


def _only(nest: LoopNest, opcode: str) -> LoopNest:
    """The nest without instructions of other opcodes."""

    def kept(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        return tuple(one for one in instructions if _opcode(one.text) == opcode)

    loops = (Loop(o.name, o.parent, kept(o.own), o.total, o.source) for o in nest.loops)
    return LoopNest(kept(nest.once), tuple(loops), nest.calls)


def _opcode(text: str) -> str:
    """``LDG`` of ``@!P0 LDG.E R1, desc[UR4][R2.64]``."""
    words = text.split()
    return words[1 if words[0].startswith("@") else 0].split(".")[0]


def measured(say: Callable[[str], None]) -> Iterator[dict[str, object]]:
    """All rows, with what they were compiled by."""
    made_by = {
        "head_dim": D,
        "group": G,
        **{name: version(name) for name in ("kvq", "torch", "triton")},
        "commit": commit(),
    }
    for target in TARGETS:
        for bits in BITS:
            for stage in STAGES:
                row = measure_stage(stage, bits, target)
                say(line(row))
                yield {**row, **made_by}


def line(row: Mapping[str, object]) -> str:
    """A row for people."""
    cells = [f"{row[name]:>8}" for name in ("target", "bits")] + [f"{row['stage']:<14}"]
    cells += [f"{row[name]:>8.2f}" for name in ("instructions", *PIPES, "lookups")]
    cells.append(f"{row['loads']:>8.3f}")
    cells += [f"{row[name]:>6}" for name in ("registers", "stack_bytes", "shared_bytes")]
    return " ".join(cells)


HEAD = " ".join(
    [f"{name:>8}" for name in ("target", "bits")]
    + [f"{'stage':<14}"]
    + [f"{name:>8}" for name in ("all", *PIPES, "lookups", "loads")]
    + [f"{name:>6}" for name in ("regs", "stack", "shared")]
)


def main() -> int:
    """Print the table, or JSON, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_CSV)
    options = parser.parse_args()
    if not options.json:
        print(HEAD)
    rows = list(measured(say=lambda text: None if options.json else print(text, flush=True)))
    if options.json:
        print(json.dumps(rows))
    write_csv(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
