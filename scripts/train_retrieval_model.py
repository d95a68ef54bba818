#!/usr/bin/env python3
"""Train a small model that answers kvq's retrieval tasks, on one CPU core in about 20 minutes.

    OMP_NUM_THREADS=1 python scripts/train_retrieval_model.py -o benchmarks/models/tiny-retrieval

Looking up what a text said is a circuit of two attention layers (induction heads: Olsson et al.,
arXiv 2209.11895), which small models learn suddenly. Four things bring it early: short texts first,
rows that repeat random words, many questions behind each text, and weight on their answers.

Writes a transformers folder: ``config.json``, ``model.safetensors`` (bfloat16), a tokenizer of whole
words, ``training_log.csv``, ``calibration.txt`` (documents to calibrate a sidecar on, of a seed of
their own) and ``README.md`` with accuracies on texts of yet another seed.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvq_evaluation.retrieval import RETRIEVAL_TASKS, evaluate_retrieval, make_examples
from kvq_evaluation.retrieval.documents import Document
from kvq_evaluation.retrieval.words import FILLER, NUMBERS, WORDS

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"

TASK_WEIGHTS = {"passkey": 1, "multi_key": 3, "variable_tracking": 3, "common_words": 2}
"""How often a row of the batch is of each task."""

ANSWER_WEIGHTS = {"passkey": 4.0, "multi_key": 1.0, "variable_tracking": 1.0, "common_words": 3.0}
"""Weight of an answer's token in the loss: more where a text has few."""

TEXT_WEIGHT = 0.05
"""Weight of any other token: enough to make the model one of the texts, too."""

DRILL_WEIGHT = 0.5

CALIBRATION_SEED, HELD_OUT_SEED = "calibration", 1_000_003
CALIBRATION_DOCUMENTS = 48


@dataclass(frozen=True)
class Phase:
    """Share of the run, from ``start``, with rows of ``seq_len`` tokens; ``copies``: repeated ones."""

    start: float
    seq_len: int
    copies: float


PHASES = (
    Phase(0.0, 96, 0.3),
    Phase(0.4, 256, 0.1),
    Phase(0.65, 512, 0.05),
    Phase(0.85, 1024, 0.0),
)
WARMUP, DECAY = 0.02, 0.4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--max-positions", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=20, help="wall-clock budget")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def word_tokenizer() -> PreTrainedTokenizerFast:
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


class Batches:
    """Rows of token ids and the weight of each in the loss.

    A row is a document, then as many of its questions with their answers as there is room for, or
    (``copies`` of them) random words twice over.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.encode_words = tokenizer.backend_tokenizer
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        self.words = tokenizer.convert_tokens_to_ids(list(WORDS))
        self.numbers = tokenizer.convert_tokens_to_ids(list(NUMBERS))
        self.content = [*self.words, *self.numbers]
        self.source = random.Random(f"train/{seed}")
        self.tasks, self.shares = list(TASK_WEIGHTS), list(TASK_WEIGHTS.values())

    def draw(self, phase: Phase, rows: int) -> tuple[Tensor, Tensor]:
        """int64 ``[B, T]`` and f32 ``[B, T]``: the weight of a token as what is predicted."""
        drawn = []
        for _ in range(rows):
            if self.source.random() < phase.copies:
                drawn.append(self._drill(phase.seq_len))
            else:
                task = self.source.choices(self.tasks, self.shares)[0]
                drawn.append(self._questions(task, phase.seq_len))
        return torch.tensor([ids for ids, _ in drawn]), torch.tensor([w for _, w in drawn])

    def _drill(self, length: int) -> tuple[list[int], list[float]]:
        """A row where nearly every second token has to be looked up: what tasks ask, laid bare."""
        kind = self.source.choice((self._copy, self._pairs, self._chains))
        said, asked = kind(length - 1)
        ids = [self.bos, *said, *(token for token, _ in asked)]
        weights = [0.0] * (len(said) + 1) + [weight for _, weight in asked]
        return self._padded(ids[:length], weights[:length], length)

    def _copy(self, room: int) -> tuple[list[int], list[tuple[int, float]]]:
        """Random words twice over."""
        words = self.source.choices(self.content, k=room // 2)
        return words, [(words[0], 0.0), *((word, DRILL_WEIGHT) for word in words[1:])]

    def _pairs(self, room: int) -> tuple[list[int], list[tuple[int, float]]]:
        """``acorn is 471.`` many times, then all of it in another order."""
        count = max(2, room // 8)
        pairs = [
            (key, number)
            for key, number in zip(
                self.source.sample(self.words, min(count, len(self.words))),
                self.source.choices(self.numbers, k=count),
            )
        ]
        said = [token for key, number in pairs for token in (key, self.id("is"), number, self.period)]
        self.source.shuffle(pairs)
        asked = [
            part
            for key, number in pairs
            for part in (
                (key, 0.0), (self.id("is"), 0.0), (number, 2 * DRILL_WEIGHT), (self.period, 0.0)
            )
        ]
        return said, asked

    def _chains(self, room: int) -> tuple[list[int], list[tuple[int, float]]]:
        """``actor = acorn.`` in chains that lie between each other, then each chain from its start."""
        count = max(2, min(room // 22, len(self.words) // 4))
        names = self.source.sample(self.words, 4 * count)
        chains = [
            [number, *names[4 * i : 4 * i + 4]]
            for i, number in enumerate(self.source.choices(self.numbers, k=count))
        ]
        turns = [i for i in range(count) for _ in range(4)]
        self.source.shuffle(turns)
        steps = [iter(zip(chain[1:], chain, strict=False)) for chain in chains]
        said = [
            token
            for i in turns
            for name, value in [next(steps[i])]
            for token in (name, self.id("="), value, self.period)
        ]
        self.source.shuffle(chains)
        asked = [
            part
            for number, *chain in chains
            for part in (
                (number, 0.0), (self.id("are"), 0.0), *((n, DRILL_WEIGHT) for n in chain), (self.period, 0.0)
            )
        ]
        return said, asked

    def id(self, word: str) -> int:
        found: int = self.encode_words.token_to_id(word)
        return found

    def _questions(self, task: str, length: int) -> tuple[list[int], list[float]]:
        ids, weights = [self.bos], [0.0]
        document, text = self._document(task, length)
        ids += text
        weights += [TEXT_WEIGHT] * len(text)
        for question in document.questions:
            asked, answer = self._encoded(question.text), self._encoded(" ".join(question.items))
            if len(ids) + len(asked) + len(answer) > length:
                break
            ids += [*asked, *answer, self.period]
            weights += [TEXT_WEIGHT] * len(asked) + [ANSWER_WEIGHTS[task]] * len(answer)
            weights.append(TEXT_WEIGHT)
        return self._padded(ids[:length], weights[:length], length)

    def _document(self, task: str, length: int) -> tuple[Document, list[int]]:
        """A document that leaves room for a question at least, and its ids."""
        made = RETRIEVAL_TASKS[task]
        has_many = task in ("multi_key", "variable_tracking")
        share = self.source.uniform(0.35, 1.0) if has_many else self.source.uniform(0.6, 1.0)
        parts = max(made.least, int(length * share / (1 if task == "common_words" else 7)))
        while True:
            document = made.build(self.source, parts)
            text = self._encoded(document.text)
            question = document.questions[0]
            rest = self._encoded(" ".join([question.text, *question.items]))
            if len(text) + len(rest) + 1 <= length or parts == made.least:
                return document, text
            parts = max(made.least, int(parts * 0.97 * (length - len(rest) - 1) / len(text)))

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.encode_words.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def period(self) -> int:
        found: int = self.encode_words.token_to_id(".")
        return found

    def _padded(
        self, ids: list[int], weights: list[float], length: int
    ) -> tuple[list[int], list[float]]:
        rest = length - len(ids)
        return ids + [self.pad] * rest, weights + [0.0] * rest


def learning_rate_scale(progress: float) -> float:
    """Warm up, hold, then fall linearly to zero: the schedule can be cut at any point."""
    if progress < WARMUP:
        return progress / WARMUP
    return min(1.0, (1.0 - progress) / DECAY)


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """The loss, and the share of answer tokens that are predicted right."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    counted = weights[:, 1:] > 0
    labels, weight, logits = ids[:, 1:][counted], weights[:, 1:][counted], logits[counted]
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    answers = weight >= 1
    right = (logits.argmax(-1) == labels)[answers].float().mean().item()
    return (each * weight).sum() / weight.sum(), right


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    batches = Batches(tokenizer, args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(model.num_parameters(), "parameters", len(tokenizer), "words", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started = time.monotonic()
    curve: list[tuple[int, int, int, float, float]] = []
    step, seen, recent = 0, 0, []
    while (progress := (time.monotonic() - started) / 60 / args.minutes) < 1:
        phase = [p for p in PHASES if p.start <= progress][-1]
        ids, weights = batches.draw(phase, args.tokens_per_step // phase.seq_len)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(progress)
        loss, right = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        recent.append((loss.item(), right))
        if step % 50 == 0:
            means = [sum(values) / len(values) for values in zip(*recent, strict=True)]
            curve.append((step, phase.seq_len, seen, means[0], means[1]))
            recent = []
            rate = seen / (time.monotonic() - started)
            print(
                f"{progress:6.1%} step {step} rows of {phase.seq_len} loss {means[0]:.4f} "
                f"right {means[1]:.3f} {rate:.0f} tok/s",
                flush=True,
            )
            if step % 500 == 0:
                report(model, tokenizer, phase.seq_len)
    save(model, tokenizer, args.output)
    report(model, tokenizer, 1024)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    shipped = type(model)(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.config.dtype = torch.bfloat16
    shipped.save_pretrained(output)
    tokenizer.save_pretrained(output)


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    for row in evaluate_retrieval(
        model, tokenizer, [], tasks=tuple(RETRIEVAL_TASKS), tokens=length, count=20, seed=HELD_OUT_SEED
    ):
        print(f"    {row.task} {length} {row.accuracy:.3f} nll {row.nll:.3f}", flush=True)


if __name__ == "__main__":
    main()
