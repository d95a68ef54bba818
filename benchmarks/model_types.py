"""Try every causal language model that transformers knows, in miniature, and say what came out.

    python benchmarks/model_types.py [-o FILE] [MODEL_TYPE ...]

Each type is tried with its default configuration, as ``kvq doctor`` tries a model with its own. Of
types whose default configuration builds no model it says that. Takes ten minutes, a few gigabytes
and no weights.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvq_formats.errors import KVQError
from kvq_runtime.examine import ExaminedLayer, examine

FIELDS = ("model_type", "outcome", "layers", "quantized", "unrotated", "options", "reason")
RESULTS = Path(__file__).parent / "results" / "model-types.csv"


def row_of(layers: tuple[ExaminedLayer, ...]) -> dict[str, str]:
    """What was found of a type that works."""
    packed = [layer for layer in layers if layer.quantized]
    options = {name for layer in packed for name in layer.options if name != "sliding_window"}
    return {
        "outcome": "works",
        "layers": str(len(layers)),
        "quantized": str(len(packed)),
        "unrotated": str(sum(layer.rotary_channels == (0, 0) for layer in packed)),
        "options": " ".join(sorted(options)),
    }


def rows(types: list[str]) -> Iterator[dict[str, str]]:
    """One a type."""
    for model_type in types:
        try:
            config = CONFIG_MAPPING[model_type]()
        # Whatever a configuration without arguments raises.
        except Exception as error:
            yield {"model_type": model_type, "outcome": "no default", "reason": str(error)[:200]}
            continue
        try:
            found = row_of(examine(config, name="it"))
        except KVQError as error:
            found = {"outcome": "refused", "reason": error.message}
        yield {"model_type": model_type, **found}


def main() -> int:
    """Write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for row in rows(arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        found.append({**dict.fromkeys(FIELDS, ""), **row})
        print(f"{row['model_type']}: {row['outcome']} {row.get('reason', '')}", file=sys.stderr)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, ("transformers", *FIELDS), extrasaction="raise", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({"transformers": transformers.__version__, **row} for row in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
