"""What lies beside the weights of a model trained on retrieval: calibration text and README.md."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_evaluation.retrieval import RETRIEVAL_TASKS, RetrievalRow, evaluate_retrieval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SEED, HELD_OUT_EXAMPLES = 1_000_003, 100
CALIBRATION_DOCUMENTS = 40
CALIBRATION_PARTS = 90
"""Sentences of a document to calibrate on; of a list, eight times as many words."""


@dataclass(frozen=True)
class Training:
    """How a model came about.

    Fields:
        curve: (step, tokens a row, tokens so far, loss, share of looked up tokens that were right).
        seed, minutes, threads, command: as they were.
    """

    curve: list[tuple[int, int, int, float, float]]
    seed: int
    minutes: float
    threads: int
    command: str


def calibration_text() -> str:
    """Documents with all their questions and answers, one a paragraph, of a seed of their own."""
    source = random.Random("calibration")
    paragraphs = []
    for index in range(CALIBRATION_DOCUMENTS):
        name = list(RETRIEVAL_TASKS)[index % len(RETRIEVAL_TASKS)]
        parts = CALIBRATION_PARTS * (8 if name == "common_words" else 1)
        document = RETRIEVAL_TASKS[name].build(source, parts)
        answered = [f"{q.text} {' '.join(q.items)}." for q in document.questions]
        paragraphs.append(" ".join([document.text, *answered]))
    return "\n\n".join(paragraphs) + "\n"


def held_out_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int
) -> list[RetrievalRow]:
    """A row a task, on texts of a seed that training did not have."""
    return evaluate_retrieval(
        model,
        tokenizer,
        [],
        tasks=tuple(RETRIEVAL_TASKS),
        tokens=tokens,
        count=HELD_OUT_EXAMPLES,
        seed=HELD_OUT_SEED,
    )


def write_readme(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: Training
) -> None:
    """Write ``README.md``: what was trained, how, and what it can do."""
    config = model.config
    lengths = (256, 512, 1024)
    measured = [row for n in lengths for row in held_out_rows(model, tokenizer, tokens=n)]
    stride = max(1, len(training.curve) // 12)
    shown = training.curve[:-1:stride] + training.curve[-1:]
    losses = "\n".join(
        f"| {step:,} | {length} | {seen:,} | {loss:.3f} | {right:.3f} |"
        for step, length, seen, loss, right in shown
    )
    accuracies = "\n".join(
        f"| {task} | {' | '.join(_cell(row) for row in measured if row.task == task)} |"
        for task in RETRIEVAL_TASKS
    )
    step, _, seen, *_ = training.curve[-1]
    text = f"""# A small model that looks things up

For measuring what a quantized cache does to retrieval ([how](../../../docs/retrieval.md)). It knows
the texts of `kvq eval --retrieval` and nothing else: its tokenizer has {len(tokenizer):,} whole
words, and other text is unknown to it.

`{type(model).__name__}`, {model.num_parameters():,} parameters, {config.num_hidden_layers} layers,
{config.num_attention_heads} query heads on {config.num_key_value_heads} key/value heads of
{config.head_dim} numbers, {config.max_position_embeddings:,} positions, bfloat16.

Made by `{training.command}` with seed {training.seed}: {step:,} steps, {seen:,} tokens, AdamW,
{training.minutes:.0f} minutes on {training.threads} CPU thread(s). Weights did not start at random
alone: two heads of the first layer begin as ones that look one and two tokens back, three of the
second as ones that match what they found, one of the last as one that averages all words
(`scripts/retrieval_start.py`); training changes them like everything else. From random weights
only the passkey was found after five minutes, and no longer run was tried.

`calibration.txt` holds {CALIBRATION_DOCUMENTS} documents with questions and answers, of a seed of
their own: `kvq calibrate benchmarks/models/tiny-retrieval --dataset
benchmarks/models/tiny-retrieval/calibration.txt`.

## Accuracy

Share of an answer's items that are right, in per cent ± one standard error, on {HELD_OUT_EXAMPLES}
texts of a seed that was not trained on, with the bfloat16 weights and an unquantized cache.

| task | {" | ".join(f"{n} tokens" for n in lengths)} |
|---|{"---|" * len(lengths)}
{accuracies}

It does not do `common_words` well: it knows the most common word and is apt to name it again as the
second or third. Longer training may mend that; it was not tried.

## Training

Means since the row before of `training_log.csv`, which has the whole curve: loss in nats a token,
weighted, and the share of tokens to be looked up (in documents and drills) that were right. One
kind of drill repeats random runs of words, whose beginnings cannot be known.

| step | tokens a row | tokens seen | loss | right |
|---|---|---|---|---|
{losses}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _cell(row: RetrievalRow) -> str:
    return f"{100 * row.accuracy:.1f} ± {100 * (row.accuracy_stderr or 0):.1f}"
