"""Write the tables of ``docs/models.md`` from what is tried and tested.

    python scripts/generate_model_docs.py [--check]

The table of families is that of the tests (``tests/support/families.py``), with what a miniature of
each was seen to do. ``--check`` writes nothing and leaves with 1 if the page is stale.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
KEPT = {
    "sliding_attention": "sliding windows",
    "linear_attention": "linear attention",
    "chunked_attention": "chunks",
    "conv": "convolutions",
}

sys.path.insert(0, str(ROOT / "tests" / "support"))


def families() -> str:
    """What each family of the tests is, what is packed of it and what stays."""
    from families import FAMILIES
    from kvq_runtime.examine import ExaminedLayer, examine
    from kvq_runtime.supported_models import text_config

    def packed(layer: ExaminedLayer, head_dim: int) -> str:
        assert layer.rotary_channels is not None
        start, stop = layer.rotary_channels
        where = "full attention" if layer.kind == "full_attention" else "windows"
        if stop == start:
            return f"{where} without RoPE"
        if stop - start < head_dim:
            return f"{where}, {stop - start} of {head_dim} channels rotated apart"
        return where

    lines = ["| family | its attention | quantized | kept | for example |", "|---|---|---|---|---|"]
    for family in FAMILIES.values():
        config = family.make().config
        head_dim = int(text_config(config).get("head_dim") or 16)
        layers = examine(config, name=family.title)
        quantized = dict.fromkeys(packed(layer, head_dim) for layer in layers if layer.quantized)
        kept = dict.fromkeys(KEPT[layer.kind] for layer in layers if not layer.quantized)
        hubs = ", ".join(f"`{hub}`" for hub in family.hub_ids)
        cells = (family.title, family.attention, "; ".join(quantized), "; ".join(kept), hubs)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def refused() -> str:
    """What is refused, with words of the reason that is given."""
    from transformers import CONFIG_MAPPING

    from families import REFUSED
    from kvq_formats.errors import UnsupportedModelError
    from kvq_runtime.examine import examine

    lines = ["| family | the reason that is given |", "|---|---|"]
    for family in REFUSED:
        try:
            examine(CONFIG_MAPPING[family.model_type](**family.options), name="MODEL")
        except UnsupportedModelError as error:
            reason = re.sub(r"transformers\.models\.\w+\.", "", error.message)
            lines.append(f"| {family.title} | {reason} |")
    return "\n".join(lines) + "\n"


PARTS = {"families": families, "refused": refused}


def page(text: str) -> str:
    """``text`` with its tables as they are now."""
    for name, write in PARTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{write()}\n{end}{after}"
    return text


def main() -> int:
    """Write or check the page."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    text = PAGE.read_text(encoding="utf-8")
    fresh = page(text)
    if "--check" in sys.argv[1:]:
        return int(fresh != text)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
