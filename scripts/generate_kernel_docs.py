"""Write the table of budgets in ``docs/kernels.md`` from ``benchmarks/kernel_budgets.csv``.

    python scripts/generate_kernel_docs.py [--check]

``--check`` writes nothing and leaves with 1 if the page is stale.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
BUDGETS = ROOT / "benchmarks" / "kernel_budgets.csv"
BEGIN, END = "<!-- budgets -->\n", "<!-- end of budgets -->\n"


def table() -> str:
    """Decode kernels by shape: instructions for each number, and bytes of stack, by target."""
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "decode"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        outliers = "1 %" if row["outliers"] == "1" else "none"
        if row["variant"] != "portable":
            outliers += f", {row['variant']}"
        shape = (
            f"{row['key_bits']} / {row['value_bits']} | {row['head_dim']} | {row['group']} "
            f"| {outliers}"
        )
        stack = f" ({row['max_stack_bytes']})" if row["max_stack_bytes"] != "0" else ""
        cells.setdefault(shape, {})[row["target"]] = row["max_instructions_per_element"] + stack
    lines = [
        f"| bits K / V | D | G | outliers | {' | '.join(targets)} |",
        "|---|---|---|---|" + "---|" * len(targets),
    ]
    for shape, found in cells.items():
        lines.append(f"| {shape} | {' | '.join(found.get(target, '') for target in targets)} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """``text`` with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write or check the page."""
    text = PAGE.read_text(encoding="utf-8")
    fresh = page(text)
    if "--check" in sys.argv[1:]:
        return int(fresh != text)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
