"""A whole model's step: a random Llama with kvq attached, against itself with the stock cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from gpu_report import CUT, Deadline, say
from gpu_shapes import Bench
from random_llama import calibrated, random_ids, random_llama
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvq

PART = "model"
LAYERS = 2
BITS = 3
CHECKED_PROMPT = 1100
CHECKED_TOKENS = 8
LARGEST_DIVERGENCE = 1e-3
"""Nats: kernels round to 16 bits what the reference holds in 32, and now and then a number of a
later layer then gets the neighbouring code."""


def run(bench: Bench, deadline: Deadline) -> None:
    """Agreement with the reference first, then speed."""
    sizes, device, report = bench.sizes, bench.device, bench.report
    positions = sizes.model_prompt + 64 + sizes.model_tokens * (sizes.model_rounds + 1)
    positions = max(positions, CHECKED_PROMPT + CHECKED_TOKENS)
    where: dict[str, object] = {"shape": "random Llama", "batch": 1, "key_bits": BITS,
                                "value_bits": BITS, "outliers": "1%"}  # fmt: skip
    with report.guarded(PART, "calibration", **where):
        begun = time.perf_counter()
        model = _tiny_llama(positions) if bench.smoke else random_llama(
            layers=LAYERS, positions=positions, dtype=torch.float32
        )  # fmt: skip
        # On the CPU: codebooks come out the same on every machine.
        sidecar = calibrated(model, bits=BITS)
        report.add(PART, "calibration", "seconds", time.perf_counter() - begun, "s", **where)
        _agreement(bench, model.to(device), sidecar, where)
        if deadline.passed():
            report.add(PART, "decode", "tokens/s", "", "1/s", CUT, **where)
            return
        _speed(bench, model.to(torch.bfloat16), sidecar, where, deadline)


def _tiny_llama(positions: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=positions,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _agreement(bench: Bench, model: Any, sidecar: Any, where: dict[str, object]) -> None:
    """Logits of the kernels against those of the reference, on the same tokens, in f32."""
    prompt, count = (270, 1) if bench.smoke else (CHECKED_PROMPT, CHECKED_TOKENS)
    ids = random_ids(1, prompt + count, seed=3).to(bench.device)
    logits = {}
    for impl in ("reference", "triton"):
        say(f"model: {impl}")
        with kvq.attach(model, sidecar, impl=impl):
            cache = kvq.PackedCache(model, sidecar, capacity=prompt + count)
            _feed(model, cache, ids[:, :prompt])
            steps = [_feed(model, cache, token) for token in ids[:, prompt:].split(1, dim=1)]
        logits[impl] = torch.cat(steps, dim=1)[0].double()
    difference = float((logits["triton"] - logits["reference"]).abs().max())
    log_reference, log_triton = (logits[name].log_softmax(-1) for name in ("reference", "triton"))
    divergence = float((log_reference.exp() * (log_reference - log_triton)).sum(-1).max())
    passed = divergence <= LARGEST_DIVERGENCE  # NaN does not
    bench.report.failures += not passed
    note = "passed" if passed else f"failed: beyond {LARGEST_DIVERGENCE}"
    cells = where | {"tokens": prompt}
    spread = float(logits["reference"].std())
    bench.report.add(PART, "logits against the reference", "largest difference", difference, "",
                     f"standard deviation of logits {spread:.3g}", **cells)  # fmt: skip
    bench.report.add(PART, "logits against the reference", "largest divergence", divergence,
                     "nats", note, **cells)  # fmt: skip


def _feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def _speed(
    bench: Bench, model: Any, sidecar: Any, where: dict[str, object], deadline: Deadline
) -> None:
    """Tokens a second, eagerly, in turns; the first round of each is not counted."""
    sizes, device, report = bench.sizes, bench.device, bench.report
    warming = int(not bench.smoke)
    rounds, tokens = sizes.model_rounds + warming, sizes.model_tokens
    total = sizes.model_prompt + rounds * tokens
    ids = random_ids(1, total, seed=4).to(device)
    contestants: dict[str, tuple[Callable[[], Any], Any]] = {
        "kvq": (
            lambda: kvq.attach(model, sidecar, impl="triton"),
            kvq.PackedCache(model, sidecar, capacity=total),
        ),
        "bf16 DynamicCache": (nullcontext, DynamicCache(config=model.config)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cells = where | {"tokens": sizes.model_prompt}
    for name, (attached, cache) in contestants.items():
        begun = time.perf_counter()
        with attached():
            _feed(model, cache, ids[:, : sizes.model_prompt])
            _wait(device)
        report.add(PART, f"{name}: prompt", "seconds", time.perf_counter() - begun, "s",
                   "with what compiles", **cells)  # fmt: skip
    for number in range(rounds):
        first = sizes.model_prompt + number * tokens
        for name, (attached, cache) in contestants.items():
            if number >= 2 and deadline.passed():
                continue
            with attached():
                _wait(device)
                begun = time.perf_counter()
                for token in ids[:, first : first + tokens].split(1, dim=1):
                    _feed(model, cache, token)
                _wait(device)
                taken = time.perf_counter() - begun
            if number >= warming:
                seconds[name].append(taken / tokens)
    for name, found in seconds.items():
        rate = 1 / statistics.median(found)
        layers = model.config.num_hidden_layers
        note = f"{layers} layers, eager, {len(found)} rounds of {tokens} tokens"
        report.add(PART, name, "tokens/s", rate, "1/s", note, **cells)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
