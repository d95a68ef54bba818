"""Tokens a second, end to end: a whole model's decode step, captured in a CUDA graph.

The shape of Llama-3-8B with random weights, batch 1, on a cache that is full of random numbers:
what a step takes does not depend on what the numbers are. Against the same model on transformers'
static bf16 cache, captured just so, with its own attention and with the best split-KV kernel over
that cache that ``bf16_decode`` has. Rates are over all tokens of all rounds, for kvq with the pages
that are packed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_baselines import dense_reference
from gpu_cases import OUTLIER_DEVIATIONS
from gpu_decode import tuned_decode
from gpu_report import Deadline, Report, say
from gpu_shapes import Bench
from random_llama import random_llama_like
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvq
from kvq_runtime.cache import packed_layers
from kvq_runtime.cuda_graph import Capture, capture_cuda_graph
from kvq_runtime.forward import Forward
from kvq_runtime.modes import lasting_tensors
from tiny_sidecars import make_sidecar

PART = "captured"
BITS = (3, 4, 2)
FILLED_AT_ONCE = 16_384
EAGER_TOKENS = 16
"""Enough for a rate: an eager step takes as long as its Python, over and over."""

SPLIT_KV = "kvq_bench_split_kv"
Step = Callable[[Tensor], Tensor]


@dataclass
class Contestant:
    """One token a call; ``tokens`` of a round, and what it took so far."""

    name: str
    step: Step
    tokens: int
    note: str = ""
    cells: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    stepped: int = 0


def run(bench: Bench, deadline: Deadline) -> None:
    """bf16 first, which says what is to be beaten; then kvq by bits, as far as time goes."""
    sizes, device, report = bench.sizes, bench.device, bench.report
    shape = sizes.captured_shape
    where: dict[str, object] = {"shape": shape.name, "batch": 1, "tokens": sizes.captured_tokens}
    with report.guarded(PART, "all", **where), lasting_tensors():
        room = sizes.captured_tokens + 2 * sizes.captured_steps * (sizes.captured_rounds + 2)
        say(f"captured: {shape.name}, {sizes.captured_tokens} tokens")
        model = random_llama_like(shape, positions=room, device=device)
        rates = {}
        with report.guarded(PART, "bf16", **where):
            rates = _bf16(bench, model, room, where)
        best = max(rates, key=lambda name: rates[name], default=None)
        for bits in BITS[:1] if bench.smoke else BITS:
            if deadline.passed():
                break
            cells = where | {"key_bits": bits, "value_bits": bits, "outliers": "1%"}
            with report.guarded(PART, "kvq", **cells):
                rate = _kvq(bench, model, bits, room, cells)
                if best is not None:
                    note = f"best is {best}"
                    ratio = rate / rates[best]
                    report.add(PART, "kvq", "times best bf16", ratio, "x", note, **cells)


def _bf16(
    bench: Bench, model: PreTrainedModel, room: int, where: dict[str, object]
) -> dict[str, float]:
    """Rates of the static cache by what attends over it."""
    sizes, device = bench.sizes, bench.device
    cache = _full_static_cache(model, room, sizes.captured_tokens, device)
    found = {}
    for name, attention in (("sdpa", None), ("triton split-KV", _split_kv(cache, bench))):
        with bench.report.guarded(PART, f"bf16 StaticCache, {name}", **where):
            with _attending(model, attention):
                decode = StaticDecode(model, cache, sizes.captured_tokens, capture=_capture(bench))
            one = Contestant(f"bf16 StaticCache, {name}", decode.step, sizes.captured_steps)
            _measure(bench, [one])
            note = f"captured; {getattr(attention, 'note', 'as transformers attends')}"
            found[one.name] = _add_rate(bench.report, one, note, where)
    return found


def _kvq(
    bench: Bench, model: PreTrainedModel, bits: int, room: int, cells: dict[str, object]
) -> float:
    """Rate of the captured step; the eager one and the equality of both are rows beside it."""
    sizes, report = bench.sizes, bench.report
    sidecar = make_sidecar(bits, model=model, half_range=OUTLIER_DEVIATIONS)
    with kvq.attach(model, sidecar, impl="triton"):
        cache = kvq.PackedCache(model, sidecar, capacity=room)
        _fill(cache, sizes.captured_tokens, bench.device)
        captured = kvq.CapturedDecode(model, cache, capture=_capture(bench))
        eagerly = partial(_eager, model, cache)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=bench.device)
        expected = eagerly(ids).clone()
        cache.crop(-1)
        equal = torch.equal(captured.step(ids), expected)
        report.failures += not equal
        note = "passed" if equal else "failed: a replay differs from the eager step"
        report.add(PART, "kvq", "logits equal eager ones", int(equal), "", note, **cells)
        contestants = [
            Contestant("kvq", captured.step, sizes.captured_steps),
            Contestant("kvq, eager", eagerly, min(EAGER_TOKENS, sizes.captured_steps)),
        ]
        _measure(bench, contestants)
        _add_rate(report, contestants[1], "every launch from Python", cells)
        report.add(PART, "kvq", "cache", cache.held_bytes / 2**30, "GiB", **cells)
        report.add(PART, "kvq", "captures", captured.captures, "", **cells)
        return _add_rate(report, contestants[0], "captured, page flushes included", cells)


def _eager(model: PreTrainedModel, cache: kvq.PackedCache, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def _measure(bench: Bench, contestants: list[Contestant]) -> None:
    """Rounds in turns, after one that is not counted."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=bench.device)
    for number in range(bench.sizes.captured_rounds + 1):
        for one in contestants:
            _wait(bench.device)
            begun = time.perf_counter()
            for _ in range(one.tokens):
                logits = one.step(ids)
            _wait(bench.device)
            if number:
                one.seconds += time.perf_counter() - begun
                one.stepped += one.tokens
            assert bool(logits.isfinite().all())


def _add_rate(report: Report, one: Contestant, note: str, cells: dict[str, object]) -> float:
    rate = one.stepped / one.seconds
    note = f"{note}; {one.stepped} tokens"
    report.add(PART, one.name, "tokens/s", rate, "1/s", note, **cells)
    report.add(PART, one.name, "ms a token", 1e3 / rate, "ms", **cells)
    return rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _capture(bench: Bench) -> Capture:
    """A CUDA graph, or what plays one where kernels are interpreted."""
    if bench.device.type == "cuda":
        return capture_cuda_graph
    from recorded_graph import record

    return record


def _fill(cache: kvq.PackedCache, tokens: int, device: torch.device) -> None:
    """Put ``tokens`` random tokens into every layer, as forwards would, without the model."""
    for layer in packed_layers(cache):
        H, D = layer.codec.num_kv_heads, layer.codec.head_dim
        for first in range(0, tokens, FILLED_AT_ONCE):
            T = min(FILLED_AT_ONCE, tokens - first)
            forward = Forward.consecutive(first, 1, T, device=device)
            forward.impl = "triton"
            keys, values = torch.randn(2, 1, H, T, D, device=device, dtype=layer.dtype)
            layer.append(keys, values, forward=forward)
            layer.end_reading()


class StaticDecode:
    """A captured step on transformers' static cache, in the way that ``CapturedDecode`` does it."""

    def __init__(
        self, model: PreTrainedModel, cache: StaticCache, tokens: int, *, capture: Capture
    ) -> None:
        device = model.device
        self._model, self._cache, self._tokens = model, cache, tokens
        self._ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._recorded = capture(self._run, self._rewind, device)
        self._rewind()

    def step(self, ids: Tensor) -> Tensor:
        """Logits ``[1, V]``, written over by the next step."""
        self._ids.copy_(ids)
        self._recorded.replay()
        logits: Tensor = self._recorded.result.logits[:, -1]
        return logits

    def _rewind(self) -> None:
        self._positions.fill_(self._tokens)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._tokens)

    def _run(self) -> Any:
        output = self._model(
            input_ids=self._ids,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions += 1
        return output


def _full_static_cache(
    model: PreTrainedModel, room: int, tokens: int, device: torch.device
) -> StaticCache:
    """Of ``room`` slots, ``tokens`` of them random, a layer at a time."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    config = model.config
    like = torch.zeros(
        1, config.num_key_value_heads, 1, config.head_dim, dtype=model.dtype, device=device
    )
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
        layer.keys[:, :, :tokens].normal_()
        layer.values[:, :, :tokens].normal_()
    return cache


def _split_kv(cache: StaticCache, bench: Bench) -> Any:
    """The fastest cut of the bf16 kernel over one layer of ``cache``; counts tokens by itself."""
    layer, tokens = cache.layers[0], bench.sizes.captured_tokens
    keys, values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
    HQ = bench.sizes.captured_shape.num_heads
    query = torch.randn(1, HQ, keys.shape[-1], device=keys.device, dtype=keys.dtype)
    expected = dense_reference(query, keys, values)
    return tuned_decode(query, [(keys, values)], bench.device, expected)


@contextmanager
def _attending(model: PreTrainedModel, attention: Any) -> Iterator[None]:
    """Let ``attention`` read the static cache, without a mask; None leaves it to the model."""
    if attention is None:
        yield
        return

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: Any
    ) -> tuple[Tensor, None]:
        lengths = (options["position_ids"][:, 0] + 1).to(torch.int32)
        output = attention.over(query[:, :, 0], key, value, lengths)
        return output[:, None].to(query.dtype), None

    before = model.config._attn_implementation
    AttentionInterface.register(SPLIT_KV, attend)
    AttentionMaskInterface.register(SPLIT_KV, lambda *_, **__: None)
    model.set_attn_implementation(SPLIT_KV)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
