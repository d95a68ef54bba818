#!/usr/bin/env python3
"""Train a small language model from plain text files, on a CPU or a GPU.

    python scripts/train_tiny_model.py TRAIN.txt ... --dev DEV.txt ... -o DIR

The Llama that ships inside kvq was made so, and the Qwen3 that accuracy is also measured on
(``--architecture qwen3``: heads of 128 numbers, norms on queries and keys).

Writes a transformers folder: ``config.json``, ``model.safetensors`` (bfloat16), the tokenizer,
``training_log.csv`` (loss curve) and ``README.md`` with what was trained, on what, and how well it
does: bits per byte on the development text and three samples.

The optimiser is AdamW on purpose: it is what the models that people quantize were trained with, and
the optimiser shapes the activation outliers that a key/value cache quantizer has to deal with.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
PROMPTS = (
    "The city of",
    "The film was directed by",
    "In the first year of the war",
)


@dataclass(frozen=True)
class Phase:
    """Share of the training run, from ``start``, that uses windows of ``seq_len`` tokens."""

    start: float
    seq_len: int


# Short windows first: attention over 2,048 tokens costs as much as the rest of this model.
PHASES = (Phase(0.0, 256), Phase(0.6, 1024), Phase(0.85, 2048))
WARMUP = 0.02
DECAY = 0.35


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", nargs="+", type=Path, help="UTF-8 text files to train on")
    parser.add_argument("--dev", nargs="+", type=Path, required=True, help="text for bits per byte")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--title", default="kvq's embedded model", help="headline of README.md")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--max-positions", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=None,
        help="wall-clock budget; the schedule shrinks to fit and the README says how far it came",
    )
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--mixing-exponent",
        type=float,
        default=0.3,
        help="a file is drawn with probability proportional to its token count to this power",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the short windows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def train_tokenizer(files: list[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts one begin-of-text token before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, file: Path) -> torch.Tensor:
    """Token ids of a whole file, int64 ``[T]``, without the begin-of-text token."""
    text = file.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Batches:
    """Random windows ``[B, T]`` of consecutive tokens of one file.

    Every second window starts with begin-of-text: prompts do, but the windows of the usual
    perplexity protocol are cut from the middle of a text, and the model has to know both.
    """

    def __init__(self, streams: list[torch.Tensor], exponent: float, bos: int, seed: int) -> None:
        self.streams = streams
        self.weights = torch.tensor([float(len(s)) ** exponent for s in streams])
        self.bos = bos
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch_size: int, seq_len: int) -> torch.Tensor:
        rows = []
        for index in torch.multinomial(self.weights, batch_size, True, generator=self.generator):
            stream = self.streams[int(index)]
            start = int(torch.randint(0, len(stream) - seq_len, (1,), generator=self.generator))
            window = stream[start : start + seq_len].clone()
            if torch.rand((), generator=self.generator) < 0.5:
                window[0] = self.bos
            rows.append(window)
        return torch.stack(rows)


def learning_rate_scale(progress: float) -> float:
    """Warm up, hold, then fall linearly to zero: the schedule can be cut at any point."""
    if progress < WARMUP:
        return progress / WARMUP
    return min(1.0, (1.0 - progress) / DECAY)


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor, device: str) -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    )


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, stream: torch.Tensor, num_bytes: int, bos: int, seq_len: int
) -> float:
    """Bits a byte of text, over non-overlapping windows that each start at begin-of-text."""
    total = 0.0
    for start in range(0, len(stream), seq_len - 1):
        window = torch.cat([torch.tensor([bos]), stream[start : start + seq_len - 1]])
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return total / math.log(2) / num_bytes


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    shipped = type(model)(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.config.dtype = torch.bfloat16
    shipped.save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[str]:
    texts = []
    for prompt in PROMPTS:
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=80,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def write_readme(args: argparse.Namespace, facts: dict, output: Path) -> None:
    curve = facts["curve"]
    stride = max(1, len(curve) // 12)
    shown = curve[:-1:stride] + curve[-1:]
    rows = [f"| {s} | {t} | {n} | {loss:.3f} |" for s, t, n, loss in shown]
    samples = "\n\n".join("> " + text.replace("\n", "\n> ") for text in facts["samples"])
    dev = "\n".join(f"| `{name}` | {value:.3f} |" for name, value in facts["dev"].items())
    mixture = "\n".join(
        f"| `{name}` | {count:,} | {share:.1%} |" for name, count, share in facts["mixture"]
    )
    output.joinpath("README.md").write_text(
        f"""# {args.title}

A small English language model that lets kvq be tried and measured offline on trained weights. It is
not for writing text.

`{facts["class"]}`, {facts["parameters"]:,} parameters, {args.layers} layers, {args.heads} query
heads on {args.kv_heads} key/value heads of {args.head_dim} numbers, {args.max_positions:,}
positions, byte-level BPE with {args.vocab_size:,} entries, bfloat16.

Made by `scripts/train_tiny_model.py` with seed {args.seed}: {facts["steps"]:,} steps of
{args.tokens_per_step:,} tokens ({facts["tokens"]:,} in all), AdamW, learning rate
{args.learning_rate:g}, windows of {", ".join(str(p.seq_len) for p in PHASES)} tokens in turn,
{facts["minutes"]:.0f} minutes on {facts["hardware"]}.

## Training text

| file | tokens | share of the windows |
|---|---|---|
{mixture}

The licences of the text are in the repository's `NOTICE`.

## Loss

Mean over the last 50 steps before each row, in nats a token; the whole curve is in
`training_log.csv`.

| step | window | tokens seen | loss |
|---|---|---|---|
{chr(10).join(rows)}

## Bits per byte on development text

Never trained on; windows of {args.max_positions:,} tokens; the bfloat16 weights as shipped.

| file | bits per byte |
|---|---|
{dev}

## Three samples

Temperature 0.8, top-p 0.95, seed {args.seed}, the first ones drawn.

{samples}
""",
        encoding="utf-8",
    )


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.train, args.vocab_size)
    streams = [encode(tokenizer, file) for file in args.train]
    batches = Batches(streams, args.mixing_exponent, tokenizer.bos_token_id, args.seed)

    config_class, model_class = ARCHITECTURES[args.architecture]
    config = config_class(
        vocab_size=args.vocab_size,
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
    model = model_class(config).to(args.device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    kept = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model) if args.compile else model

    started = time.monotonic()
    curve: list[tuple[int, int, int, float]] = []
    step, seen, recent, saved_at = 0, 0, [], 0.0
    while True:
        minutes = (time.monotonic() - started) / 60
        progress = step / args.steps
        if args.max_minutes:
            progress = max(progress, minutes / args.max_minutes)
        if progress >= 1:
            break
        phase = [p for p in PHASES if p.start <= progress][-1]
        ids = batches.draw(args.tokens_per_step // phase.seq_len, phase.seq_len).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(progress)
        runner = compiled if phase is PHASES[0] else model
        loss = next_token_loss(runner, ids, args.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        recent.append(loss.item())
        if step % 50 == 0:
            curve.append((step, phase.seq_len, seen, sum(recent) / len(recent)))
            recent = []
            rate = seen / (time.monotonic() - started)
            print(
                f"{progress:6.1%} step {step} loss {curve[-1][-1]:.4f} {rate:.0f} tok/s", flush=True
            )
        if progress - saved_at >= 0.1:
            save(model, tokenizer, args.output)
            saved_at = progress

    save(model, tokenizer, args.output)
    with open(args.output / "training_log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "seq_len", "tokens", "loss"])
        writer.writerows((s, t, n, f"{loss:.4f}") for s, t, n, loss in curve)

    shipped = model_class.from_pretrained(args.output).eval()
    shares = (batches.weights / batches.weights.sum()).tolist()
    facts = {
        "class": model_class.__name__,
        "parameters": shipped.num_parameters(),
        "steps": step,
        "tokens": seen,
        "minutes": (time.monotonic() - started) / 60,
        "hardware": "one GPU" if args.device == "cuda" else f"{torch.get_num_threads()} CPU cores",
        "curve": curve,
        "mixture": [
            (file.name, len(stream), share)
            for file, stream, share in zip(args.train, streams, shares, strict=True)
        ],
        "dev": {
            file.name: bits_per_byte(
                shipped,
                encode(tokenizer, file),
                file.stat().st_size,
                tokenizer.bos_token_id,
                args.max_positions,
            )
            for file in args.dev
        },
        "samples": sample(shipped, tokenizer, args.seed),
    }
    write_readme(args, facts, args.output)
    print({key: facts[key] for key in ("steps", "tokens", "minutes", "dev")})


if __name__ == "__main__":
    main()
