"""Write the tables of ``docs/models.md`` from what is tried and tested.

    python scripts/generate_model_docs.py [--check]

The table of families is that of the tests (``tests/support/families.py``), with what a miniature of
each was seen to do; the list of types is what ``benchmarks/model_types.py`` found. ``--check``
writes nothing and leaves with 1 if the page is stale.
"""

from __future__ import annotations

import csv
import logging
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
TYPES = ROOT / "benchmarks" / "results" / "model-types.csv"
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


def types() -> str:
    """Every type that transformers knows, from the last sweep."""
    with TYPES.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    works = [row for row in rows if row["outcome"] == "works"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["outcome"] != "works":
            reasons[_in_general(row["reason"], row["model_type"])].append(row["model_type"])
    lines = [
        f"transformers {rows[0]['transformers']}: {len(works)} of {len(rows)} types work.",
        "",
        f"**Works**: {', '.join(_named(row) for row in works)}.",
        "",
        "| not served | types |",
        "|---|---|",
    ]
    for reason, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {reason} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def _named(row: dict[str, str]) -> str:
    left = int(row["layers"]) - int(row["quantized"])
    return f"{row['model_type']}\\*" if left else row["model_type"]


def _in_general(reason: str, model_type: str) -> str:
    """A reason without what is of one model only, so that equal ones come together."""
    general = {
        "multi-head latent": "multi-head latent attention",
        "encoder-decoder": "encoder-decoder",
        "not a causal": "not a causal language model",
        "no apply_rotary_pos_emb": "no RoPE that kvq could store keys before",
        "does not take queries and keys": "rotates queries and keys one by one",
        "attention interface": "does not use transformers' attention interface",
        "no attention layers": "no attention layers that are known by their index",
        "no num_attention_heads": "no attention, or none that its configuration tells of",
        "no num_hidden_layers": "no attention, or none that its configuration tells of",
        "nothing to quantize": "no layer attends to the whole context (in its default size)",
        "knows how to quantize": "layers of other types (indexed, compressed, hybrid)",
        "shares one cache": "shares one cache among several layers",
        "differ in shape": "caches of several shapes",
        "vectors of two sizes": "caches of several shapes",
        "over keys of (heads": "caches of several shapes",
        "between RoPE and attention": "changes keys between RoPE and the cache",
        "packed pages cannot do": "does something with its cache that packed pages cannot do",
        "never calls an attention": "has layers that never call attention",
        "cannot be built": "the default configuration builds no model",
        "fails by itself": "the default configuration runs no small model",
        "modules with a buffer": "has several modules of RoPE for one layer",
        "before it does": "caches keys before it rotates them",
        "validation error": "the default configuration builds no model",
    }
    return next((words for part, words in general.items() if part in reason), reason)


PARTS = {"families": families, "refused": refused, "types": types}


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
