#!/usr/bin/env python3
"""Train a small model that answers kvq's retrieval tasks, on one CPU core in about 20 minutes.

    OMP_NUM_THREADS=1 python scripts/train_retrieval_model.py -o benchmarks/models/tiny-retrieval

Writes a transformers folder: ``config.json``, ``model.safetensors`` (bfloat16), a tokenizer of
whole words, ``training_log.csv``, ``calibration.txt`` (documents to calibrate a sidecar on) and
``README.md``, with accuracies on texts that neither saw.

Weights start as ``retrieval_start.py`` says, rows are those of ``retrieval_rows.py``: short ones
first, with many questions behind each text. The schedule is one of time: a faster core sees more.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from retrieval_card import Training, calibration_text, write_readme
from retrieval_rows import Rows
from retrieval_start import ROTARY_BASE, SLOT, start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Words

from kvq_evaluation.retrieval import RETRIEVAL_TASKS
from kvq_evaluation.retrieval.words import FILLER, NUMBERS, WORDS

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
POSITIONS = 1024
REPORT_EVERY = 50


@dataclass(frozen=True)
class Phase:
    """Share of the run, from ``start``, with rows of ``length`` tokens; a share are drills."""

    start: float
    length: int
    drills: float


PHASES = (Phase(0.0, 128, 0.5), Phase(0.2, 256, 0.3), Phase(0.4, 512, 0.2), Phase(0.65, 1024, 0.1))
WARMUP, DECAY = 0.02, 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=16, help="wall-clock budget")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def word_tokenizer() -> Words:
    """A token a word or punctuation mark of the tasks' texts, and one that begins every text."""
    source = random.Random(0)
    texts = [*WORDS, *NUMBERS, *FILLER]
    for task in RETRIEVAL_TASKS.values():
        document = task.build(source, task.least)
        texts += [document.text, *(question.text for question in document.questions)]
    words = dict.fromkeys(part for text in texts for part in re.findall(r"\w+|[^\w\s]", text))
    vocabulary = {word: index for index, word in enumerate([BOS, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return Words(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def make_model(args: argparse.Namespace, tokenizer: Words) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=3 * SLOT,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=SLOT,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    start(model)
    return model


def learning_rate_scale(progress: float) -> float:
    """Warm up, hold, then fall linearly to zero: the schedule can be cut at any point."""
    if progress < WARMUP:
        return progress / WARMUP
    return min(1.0, (1.0 - progress) / DECAY)


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """The loss, nats a token, and the share of looked up tokens that are predicted right."""
    counted = weights[:, 1:] > 0
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][counted]
    labels, weight = ids[:, 1:][counted], weights[:, 1:][counted]
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(-1) == labels)[weight > 0.1].float().mean().item()
    return (each * weight).sum() / weight.sum(), right


def train(
    args: argparse.Namespace, model: LlamaForCausalLM, rows: Rows
) -> list[tuple[int, int, int, float, float]]:
    """Train for so many minutes; returns the curve of ``retrieval_card.Training``."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started = time.monotonic()
    curve, recent, step, seen = [], [], 0, 0
    while (progress := (time.monotonic() - started) / 60 / args.minutes) < 1:
        phase = [p for p in PHASES if p.start <= progress][-1]
        ids, weights = rows.draw(
            args.tokens_per_step // phase.length, phase.length, drills=phase.drills
        )
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(progress)
        loss, right = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        recent.append((loss.item(), right))
        if step % REPORT_EVERY == 0:
            means = [sum(values) / len(values) for values in zip(*recent, strict=True)]
            curve.append((step, phase.length, seen, *means))
            recent = []
            print(f"{progress:6.1%} step {step} rows of {phase.length} {means}", flush=True)
    return curve


def save(model: LlamaForCausalLM, output: Path) -> None:
    shipped = type(model)(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.config.dtype = torch.bfloat16
    shipped.save_pretrained(output)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(args.output)
    model = make_model(args, tokenizer)
    started = time.monotonic()
    curve = train(args, model, Rows(tokenizer, args.seed))
    minutes = (time.monotonic() - started) / 60
    save(model, args.output)
    with open(args.output / "training_log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "row_tokens", "tokens", "loss", "looked_up_right"])
        writer.writerows((*counts, f"{loss:.4f}", f"{right:.4f}") for *counts, loss, right in curve)
    (args.output / "calibration.txt").write_text(calibration_text(), encoding="utf-8")
    write_readme(
        args.output,
        LlamaForCausalLM.from_pretrained(args.output).eval(),
        tokenizer,
        Training(
            curve=curve,
            seed=args.seed,
            minutes=minutes,
            threads=torch.get_num_threads(),
            command=f"scripts/{Path(__file__).name}",
        ),
    )


if __name__ == "__main__":
    main()
