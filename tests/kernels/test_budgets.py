"""Kernels compiled for devices that are not here stay within their budgets."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BUDGETS = BENCHMARKS / "kernel_budgets.csv"


def rows() -> list[dict[str, str]]:
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


BUDGETED_TRITON = "3.7"
"""Another compiler makes other code."""


@pytest.mark.skipif(
    not version("triton").startswith(BUDGETED_TRITON),
    reason=f"budgets are counted with Triton {BUDGETED_TRITON}",
)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942", "hip:gfx90a"])
def test_no_budget_is_exceeded(target: str) -> None:
    # The interpreter and the compiler exclude each other in one process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARKS / "kernel_variants.py", "--json", "--target", target]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    result = json.loads(ran.stdout)
    assert result["violations"] == []
    wanted = [row for row in rows() if row["target"] == target and row["ci"] == "1"]
    assert len(result["variants"]) == len(wanted) > 0


def test_the_page_shows_the_budgets() -> None:
    script = BENCHMARKS.parent / "scripts" / "generate_kernel_docs.py"
    ran = subprocess.run([sys.executable, script, "--check"], check=False)
    assert ran.returncode == 0, "make docs"


@pytest.mark.parametrize(("bits", "most"), [("2", 4.4), ("3", 4.6), ("4", 4.8)])
def test_the_fast_path_is_fast(bits: str, most: float) -> None:
    """A whole decode, side passes and merge included; the aims were 3.5, 3.5 and 4.2."""
    (row,) = (
        row
        for row in rows()
        if (row["variant"], row["target"]) == ("registers", "cuda:90")
        and (row["key_bits"], row["value_bits"]) == (bits, bits)
        and (row["head_dim"], row["group"], row["outliers"]) == ("128", "4", "1")
    )
    assert row["ci"] == "1"
    assert float(row["max_instructions_per_element"]) <= most
    assert int(row["max_stack_bytes"]) <= 128


def test_every_variant_has_its_limits() -> None:
    """At most 30 are compiled in CI; only prefill, whose length varies, has no count."""
    assert sum(row["ci"] == "1" for row in rows()) <= 30
    for row in rows():
        assert row["max_stack_bytes"] != "" != row["max_shared_bytes"], row
        counted = row["kernel"] in ("decode", "dequantize", "pack")
        assert (row["max_instructions_per_element"] != "") == counted, row
