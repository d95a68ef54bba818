"""Sidecars and baselines side by side, on one path and on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from garbage import with_garbage_codebooks
from kvq_evaluation.attention_error import attention_errors
from kvq_evaluation.baselines.int_per_token import IntPerToken
from kvq_evaluation.caches import decoding_reads_codes, evaluate_caches, sidecar_bits
from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.report import EvaluationRow
from kvq_evaluation.statistics import paired_difference
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import ConfigError
from kvq_runtime.attach import attach
from kvq_runtime.cache_argument import cache_name, returned_cache
from kvq_runtime.sidecar_codec import SidecarCodec
from tiny_sidecars import make_sidecar

BOTH = ("prefill", "decode")
LAYERS = (0, 1)


def random_windows(count: int, length: int) -> Tensor:
    return torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def windows() -> Tensor:
    """Three of less than a page: decoding reads nothing from codes."""
    return random_windows(3, 12)


def measured(model: LlamaForCausalLM, windows: Tensor, **options: Any) -> list[EvaluationRow]:
    sidecars = {"four": make_sidecar(4), "two": make_sidecar(2)}
    baselines = {"int3": IntPerToken(bits=3, layers=LAYERS)}
    given = {"sidecars": sidecars, "baselines": baselines, "path": BOTH, "dataset": "random"}
    return evaluate_caches(model, windows, **{**given, **options})


def test_rows_of_both_paths_in_order(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    rows = measured(tiny_llama, windows)
    assert [(row.name, row.path) for row in rows] == [
        (UNQUANTIZED, "prefill"),
        ("four", "prefill"),
        ("two", "prefill"),
        ("int3", "prefill"),
        ("four", "decode"),
        ("two", "decode"),
        ("int3", "decode"),
    ]
    turned = measured(tiny_llama, windows, path=BOTH[::-1])
    assert turned == [rows[0], *rows[4:], *rows[1:4]]
    for row in rows:
        assert row.metrics is not None
        assert row.metrics.name == row.name


def test_both_paths_at_once_say_what_each_says(
    tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    rows = measured(tiny_llama, windows)
    assert measured(tiny_llama, windows, path="prefill") == rows[:4]
    assert measured(tiny_llama, windows, path="decode") == [rows[0], *rows[4:]]
    assert measured(tiny_llama, windows, path=("decode",)) == [rows[0], *rows[4:]]


def test_the_unquantized_model_runs_once_a_window(
    tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    lengths: list[int] = []
    tiny_llama.register_forward_hook(lambda _m, _a, output: lengths.append(output.logits.shape[1]))
    measured(tiny_llama, windows)
    # Unquantized, three caches in one forward, the baseline in another; two sidecars token by token
    # up to the last token, which is only a label.
    assert sorted(lengths) == [1] * (3 * 2 * 11) + [12] * (3 * (1 + 3 + 1))


def test_errors_are_paired_window_by_window(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    first, *rows = measured(tiny_llama, windows)
    assert first.metrics is not None
    for row in rows:
        assert row.metrics is not None
        assert torch.equal(row.metrics.tokens, first.metrics.tokens)
        # d exp(mean) = exp(mean) * d mean, on the same windows of 11 tokens.
        each = row.perplexity * row.metrics.nll / 11 - first.perplexity * first.metrics.nll / 11
        assert row.perplexity_increase_stderr == pytest.approx(float(each.std() / 3**0.5))
        assert row.perplexity_increase == pytest.approx(row.perplexity - first.perplexity)
    four, two = rows[0].metrics, rows[1].metrics
    assert four is not None
    assert two is not None
    difference = paired_difference(four, two)
    assert difference.mean == pytest.approx(rows[0].kl - rows[1].kl)
    each = (four.kl - two.kl) / 11
    assert difference.stderr == pytest.approx(float(each.std() / 3**0.5))


def test_kl_of_single_tokens(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    _, row = measured(tiny_llama, windows, sidecars={"two": make_sidecar(2)}, baselines=None,
                      path="prefill")  # fmt: skip
    with torch.no_grad():
        p = tiny_llama(windows).logits.double().log_softmax(-1)
        with attach(tiny_llama, make_sidecar(2), rule="evaluation"):
            q = tiny_llama(windows).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1].flatten().sort().values
    assert len(kl) == 33
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert row.kl_median == pytest.approx(float(kl[16]), rel=1e-4)
    assert row.kl_p99 == pytest.approx(float(kl[32]), rel=1e-4)


def test_decoding_reads_own_pages_exactly_and_a_prefill_does_not(
    tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    garbage = {"two": with_garbage_codebooks(make_sidecar(2))}
    rows = measured(tiny_llama, windows, sidecars=garbage)
    kl = {(row.name, row.path): row.kl for row in rows}
    for name in ("two", "int3"):
        assert kl[name, "prefill"] > 1e-4
        # Rounding.
        assert abs(kl[name, "decode"]) < 1e-5
    assert kl["two", "prefill"] > 0.1


def test_what_a_cache_costs_and_does_to_each_layer(
    tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    rows = measured(tiny_llama, windows)
    four, int3 = make_sidecar(4), IntPerToken(bits=3, layers=LAYERS)
    expected = attention_errors(tiny_llama, windows[:1], {"four": SidecarCodec(four), "int3": int3})
    assert (rows[0].effective_bits, rows[0].effective_bits_total) == (32.0, 32.0)
    assert rows[0].attention_error == {}
    # One figure a cache, whatever the path.
    for row in rows[1::3]:
        assert (row.effective_bits, row.effective_bits_total) == sidecar_bits(four, tokens=12)
        assert row.attention_error == expected["four"]
    for row in rows[3::3]:
        bits = int3.effective_bits(2, 16, tokens=12)
        assert (row.effective_bits, row.effective_bits_total) == (bits, bits)
        assert row.attention_error == expected["int3"]
        assert set(row.attention_error) == set(LAYERS)


def test_a_sidecar_and_a_baseline_of_one_name(
    tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    baselines = {"four": IntPerToken(bits=3, layers=LAYERS)}
    for path in (BOTH, "decode"):
        with pytest.raises(ConfigError, match="both named 'four'") as caught:
            measured(tiny_llama, windows, baselines=baselines, path=path)
        assert "rename" in (caught.value.hint or "")


@pytest.mark.parametrize("path", [*BOTH, BOTH])
@pytest.mark.parametrize("kind", ["sidecars", "baselines"])
def test_nothing_is_named_as_the_unquantized_model(
    tiny_llama: LlamaForCausalLM, windows: Tensor, kind: str, path: Any
) -> None:
    caches = {"sidecars": make_sidecar(4), "baselines": IntPerToken(bits=3, layers=LAYERS)}
    named = {UNQUANTIZED: caches[kind]}
    with pytest.raises(ConfigError, match="named 'unquantized'") as caught:
        measured(tiny_llama, windows, path=path, **{kind: named})
    assert caught.value.hint


@pytest.mark.parametrize("path", ["whole", ("prefill", "whole"), ("prefill", "")])
def test_a_path_that_there_is_not(tiny_llama: LlamaForCausalLM, windows: Tensor, path: Any) -> None:
    with pytest.raises(ConfigError, match="expected 'prefill' or 'decode'") as caught:
        measured(tiny_llama, windows, path=path)
    assert "--path" in (caught.value.hint or "")


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("recent", [0, 3])
@torch.no_grad()
def test_decoding_reads_codes_where_the_runtime_rule_does(
    tiny_llama: LlamaForCausalLM, sinks: int, recent: int
) -> None:
    """A garbage codebook shows in the last query's logits, or not at all."""
    sidecar = with_garbage_codebooks(make_sidecar(2, sink_tokens=sinks, recent_tokens=recent))
    border = sinks + PAGE_TOKENS + recent + 2
    answers = []
    for tokens in (border - 1, border, border + 1):
        ids = random_windows(1, tokens)
        stock = tiny_llama(ids).logits[0, tokens - 2]
        with attach(tiny_llama, sidecar, rule="runtime"):
            begun = tiny_llama(ids[:, : tokens - 4], use_cache=True)
            for place in (tokens - 4, tokens - 3, tokens - 2):
                cache = {cache_name(tiny_llama.forward): returned_cache(begun)}
                found = tiny_llama(ids[:, place : place + 1], **cache).logits[0, 0]
        # fp32 sums over some 260 numbers in another order, in each of two layers.
        rounding = 512 * 2.0**-23 * float(stock.abs().max()) * 8
        reads = bool((found - stock).abs().max() > rounding)
        assert decoding_reads_codes(sidecar.config, tokens=tokens) == reads
        answers.append(reads)
    assert answers == [False, True, True]
