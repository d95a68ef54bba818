"""Measure what quantized caches do to retrieval, and to perplexity and KL of the same texts.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py [--examples 50] [--table-only]

With 50 examples it takes some 13 minutes of one core, with 18 five. The model is the small one that
was trained on the tasks, calibrated on the text that lies beside it. Writes
``benchmarks/results/retrieval.csv`` and the tables of ``docs/retrieval.md``.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from results_csv import REPOSITORY, PlainProgress, provenance, write_csv

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from kvq_evaluation.baselines.named import Baseline
    from kvq_formats.sidecar import Sidecar

MODEL = REPOSITORY / "benchmarks" / "models" / "tiny-retrieval"
RESULTS = REPOSITORY / "benchmarks" / "results" / "retrieval.csv"
PAGE = REPOSITORY / "docs" / "retrieval.md"
BITS = (4, 3, 2)
BASELINES = ("hadamard2", "kivi2-g64", "int2")
LENGTHS = (512, 1024)
SEED = 0
TEXT_WINDOWS, TEXT_SEED = 8, "text"
PATHS = ("prefill", "decode")
TEXT = "text"
COLUMNS = (
    "effective_bits", "accuracy", "accuracy_stderr", "difference", "difference_stderr", "nll",
    "nll_stderr", "perplexity", "perplexity_stderr", "kl", "kl_stderr",
)  # fmt: skip


def caches(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Sidecar], dict[str, Baseline]]:
    """Ours at each width, garbage made of the widest, and rivals with the same sinks."""
    from accuracy_garbage import garbage

    import kvq
    from kvq_evaluation.baselines.named import BaselineName
    from kvq_runtime.models import quantized_layers

    def no_samples() -> Any:
        raise ValueError("none of these baselines is calibrated")

    text = str(MODEL / "calibration.txt")
    sidecars = {
        f"kvq {bits}": kvq.calibrate(MODEL, bits=bits, dataset=text, seq_len=1024) for bits in BITS
    }
    first = sidecars[f"kvq {BITS[0]}"]
    sidecars["garbage"] = garbage(first)
    rivals = {
        name: BaselineName.parse(name).make(
            layers=quantized_layers(model.config),
            samples=no_samples,
            sink_tokens=first.config.sink_tokens,
            recent_tokens=first.config.recent_tokens,
        )
        for name in BASELINES
    }
    return sidecars, rivals


def text_windows(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Documents with many questions and answers, int64 ``[S, T]``: what the model is one of."""
    import torch

    from kvq_evaluation.retrieval import RETRIEVAL_TASKS

    source = random.Random(TEXT_SEED)
    windows = []
    for index in range(TEXT_WINDOWS):
        name = list(RETRIEVAL_TASKS)[index % len(RETRIEVAL_TASKS)]
        parts = length // (2 if name == "common_words" else 12)
        document = RETRIEVAL_TASKS[name].build(source, parts)
        while len(ids := tokenizer(_with_answers(document))["input_ids"]) < length:
            parts += 8
            document = RETRIEVAL_TASKS[name].build(source, parts)
        windows.append(ids[:length])
    return torch.tensor(windows)


def _with_answers(document: Any) -> str:
    answered = [f"{q.text} {' '.join(q.items)}." for q in document.questions]
    return " ".join([document.text, *answered])


def measure(count: int) -> list[dict[str, object]]:
    """A row for each length, task, cache and path, and one of the text for each cache and path."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvq_evaluation.caches import evaluate_caches
    from kvq_evaluation.retrieval import (
        RETRIEVAL_TASKS,
        retrieval_examples,
        retrieval_of_caches,
    )

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sidecars, rivals = caches(model, tokenizer)
    progress = PlainProgress()
    rows: list[dict[str, object]] = []
    for length in LENGTHS:
        origin = provenance(model, name=MODEL.name, seq_len=length)

        def keep(task: str, row: Any, count: int, origin: dict[str, object] = origin) -> None:
            values = {name: getattr(row, name, None) for name in COLUMNS}
            rows.append(
                {**origin, "task": task, "cache": row.name, "path": row.path, "count": count}
                | values
            )

        examples = retrieval_examples(
            tokenizer, tuple(RETRIEVAL_TASKS), tokens=length, count=count, seed=SEED
        )
        for found in retrieval_of_caches(
            model, examples, sidecars, rivals, path=PATHS, progress=progress
        ):
            keep(found.task, found, found.examples)
        windows = text_windows(tokenizer, length)
        for one in evaluate_caches(
            model, windows, sidecars, rivals, dataset=TEXT, progress=progress
        ):
            keep(TEXT, one, one.windows)
    return rows


def table(rows: Sequence[dict[str, str]], length: str, path: str) -> str:
    """A row a cache: accuracy of each task and nll of its answers, then the text's ppl and KL."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != TEXT]
    by = {(r["seq_len"], r["task"], r["cache"], r["path"]): r for r in rows}
    lines = [
        f"| cache | bits | {' | '.join(tasks)} | ppl | KL |",
        f"|---|---|{'---|' * len(tasks)}---|---|",
    ]
    for cache in dict.fromkeys(row["cache"] for row in rows):
        of_cache = "prefill" if cache == "unquantized" else path
        found = [by[length, task, cache, of_cache] for task in tasks]
        text = by[length, TEXT, cache, "prefill"]
        cells = [cache, f"{float(found[0]['effective_bits']):.2f}"]
        cells += [
            f"{100 * float(r['accuracy']):.1f} ± {100 * float(r['accuracy_stderr']):.1f} "
            f"({float(r['nll']):.2f})"
            for r in found
        ]
        cells += [f"{float(text['perplexity']):.3f}", f"{float(text['kl']):.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page() -> None:
    """Put the tables of the CSV between the page's markers."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = PAGE.read_text(encoding="utf-8")
    for length in LENGTHS:
        for path in PATHS:
            begin = f"<!-- {path} {length} -->\n"
            end = f"<!-- end of {path} {length} -->\n"
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}\n{table(rows, str(length), path)}\n\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table-only", action="store_true", help="from the CSV that is there")
    parser.add_argument("--examples", type=int, default=50, help="texts of a task")
    args = parser.parse_args()
    if not args.table_only:
        write_csv(RESULTS, measure(args.examples))
    write_page()


if __name__ == "__main__":
    main()
