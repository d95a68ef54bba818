from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from garbage import with_garbage_codebooks
from kvq_calibration.pipeline import calibrate
from kvq_evaluation.caches import decoding_reads_codes, evaluate_caches, sidecar_bits
from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath
from kvq_evaluation.report import HEADERS, EvaluationRow, table
from kvq_evaluation.statistics import WindowMetrics
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.errors import FingerprintMismatchError
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar


def random_windows(count: int, length: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(320, (count, length), generator=generator)


def make_sidecar(model: LlamaForCausalLM, *, bits: int) -> Sidecar:
    fingerprint = Fingerprint.from_config(model.config.to_dict())
    return calibrate(
        model,
        random_windows(2, 128, seed=3),
        KVQConfig(key_bits=bits, value_bits=bits),
        base_model=BaseModelRecord(id="tiny", revision=None, fingerprint=fingerprint),
        calibration=CalibrationRecord(
            dataset="random", revision=None, num_samples=2, seq_len=128, seed=3, token_sha256="0"
        ),
    )


def metrics(name: str, nll: list[float], kl: list[float]) -> WindowMetrics:
    scores = [(10, n, k, 9) for n, k in zip(nll, kl, strict=True)]
    return WindowMetrics.from_scores(name, scores)


def two_rows(*, windows_available: int | None = None, windows: int = 2) -> list[EvaluationRow]:
    reference = metrics(UNQUANTIZED, [20.0, 24.0][:windows], [0.0, 0.0][:windows])
    variant = metrics("3 bit", [21.0, 25.5][:windows], [0.5, 0.7][:windows])
    return [
        EvaluationRow.from_metrics(
            m,
            reference=reference,
            dataset="text",
            effective_bits=bits,
            effective_bits_total=bits + 0.1,
            windows_available=windows_available,
        )
        for m, bits in ((reference, 16.0), (variant, 3.44))
    ]


def test_rows_hold_what_the_windows_say() -> None:
    reference, row = two_rows()
    assert reference.perplexity_increase == 0
    assert reference.perplexity_increase_stderr == pytest.approx(0, abs=1e-12)
    assert row.perplexity == pytest.approx(torch.tensor(46.5 / 20).exp().item())
    assert row.perplexity_increase == pytest.approx(row.perplexity - reference.perplexity)
    assert row.kl == pytest.approx(0.06)
    assert row.agreement == pytest.approx(0.9)
    assert (row.windows, row.tokens, row.path, row.partial) == (2, 20, "prefill", False)


def test_json_is_plain_and_complete() -> None:
    _, variant = two_rows(windows_available=7)
    row = json.loads(json.dumps(variant.to_json(), allow_nan=False))
    assert row["partial"] is True
    assert row["path"] == "prefill"
    assert row["per_window"] == {
        "tokens": [10, 10],
        "nll": [21.0, 25.5],
        "kl": [0.5, 0.7],
        "agreement": [9, 9],
    }
    fields = set(EvaluationRow.__dataclass_fields__) - {"metrics", "seeds"}
    assert set(row) == fields | {"partial", "per_window"}


def test_table_cells() -> None:
    drawn = table(two_rows())
    assert drawn.headers == HEADERS
    assert drawn.rows[0] == (
        UNQUANTIZED, "16.00", "9.025 ± 1.805", "", "", "", "90.00 %", "prefill",
    )  # fmt: skip
    assert drawn.rows[1][:2] == ("3 bit", "3.44")
    assert drawn.rows[1][4] == "0.06000 ± 0.01000"
    # Window sums alone say nothing of single tokens.
    assert drawn.rows[1][5] == ""
    assert drawn.caption == "text: 2 windows, 20 tokens scored"


def test_a_partial_result_says_so() -> None:
    assert table(two_rows(windows_available=7)).caption.startswith("text: partial: 2 windows of 7")


def test_one_window_shows_no_error() -> None:
    drawn = table(two_rows(windows=1))
    assert drawn.rows[1][4] == "0.05000"
    assert two_rows(windows=1)[1].to_json()["kl_stderr"] is None
    assert drawn.caption == "text: 1 window, 10 tokens scored"


def test_no_rows_no_caption() -> None:
    assert table([]).rows == ()
    assert table([]).caption == ""


def test_sidecars_are_measured(tiny_llama: LlamaForCausalLM) -> None:
    four, two = make_sidecar(tiny_llama, bits=4), make_sidecar(tiny_llama, bits=2)
    # More than four pages, so that complete and incomplete pages take part.
    rows = evaluate_caches(
        tiny_llama,
        random_windows(1, 1100, seed=4)[:, :1024],
        {"four": four, "two": two, "garbage": with_garbage_codebooks(four)},
        dataset="random",
    )
    assert [row.name for row in rows] == [UNQUANTIZED, "four", "two", "garbage"]
    unquantized, by_four, by_two, garbage = rows
    assert unquantized.kl == 0
    assert unquantized.effective_bits == 32
    assert 0 < by_four.kl < by_two.kl < garbage.kl
    assert by_four.agreement > garbage.agreement
    assert (by_four.effective_bits, by_four.effective_bits_total) == sidecar_bits(four, tokens=1024)
    assert by_two.effective_bits < by_four.effective_bits < by_four.effective_bits_total


def test_layers_of_different_widths_have_the_mean_of_their_bits(
    tiny_llama: LlamaForCausalLM,
) -> None:
    four, two = make_sidecar(tiny_llama, bits=4), make_sidecar(tiny_llama, bits=2)
    mixed = replace(
        four,
        config=four.config.with_layer_bits({0: (4, 4), 1: (2, 2)}),
        layers={0: four.layers[0], 1: two.layers[1]},
    )
    ends = zip(sidecar_bits(four, tokens=1024), sidecar_bits(two, tokens=1024), strict=True)
    means = [(high + low) / 2 for high, low in ends]
    assert sidecar_bits(mixed, tokens=1024) == pytest.approx(means)
    rows = evaluate_caches(
        tiny_llama,
        random_windows(1, 600, seed=4),
        {"four": four, "mixed": mixed, "two": two},
        dataset="random",
    )
    by_four, by_both, by_two = (row.kl for row in rows[1:])
    assert by_four < by_both < by_two
    assert (rows[2].effective_bits, rows[2].effective_bits_total) == sidecar_bits(mixed, tokens=600)


def test_sidecars_are_measured_by_decoding(tiny_llama: LlamaForCausalLM) -> None:
    three = make_sidecar(tiny_llama, bits=3)
    sidecars = {"three": three, "garbage": with_garbage_codebooks(three)}
    # Three complete pages: own pages are exact, so that only older ones can do harm.
    windows = random_windows(1, 3 * PAGE_TOKENS + 20, seed=4)
    decoded, whole = (
        evaluate_caches(tiny_llama, windows, sidecars, dataset="random", path=path)
        for path in get_args(MeasuredPath)[::-1]
    )
    assert [row.path for row in decoded] == ["prefill", "decode", "decode"]
    assert [row.path for row in whole] == ["prefill"] * 3
    unquantized, ours, garbage = decoded
    assert unquantized == whole[0]
    # Garbage is worse by an order of magnitude, not by a hair.
    assert 0 < 10 * ours.kl < garbage.kl
    assert garbage.agreement < ours.agreement
    for one, other in zip(decoded[1:], whole[1:], strict=True):
        assert one.tokens == other.tokens
        assert one.effective_bits == other.effective_bits
        assert one.effective_bits_total == other.effective_bits_total
        # The query's own page is decoded on the prefill path only.
        assert one.kl < other.kl


def test_decoding_less_than_a_page_is_exact(tiny_llama: LlamaForCausalLM) -> None:
    sidecar = make_sidecar(tiny_llama, bits=2)
    exact, first = (
        random_windows(1, tokens, seed=4) for tokens in (PAGE_TOKENS + 2, PAGE_TOKENS + 3)
    )
    assert not decoding_reads_codes(sidecar.config, tokens=exact.shape[1])
    assert decoding_reads_codes(sidecar.config, tokens=first.shape[1])
    sidecars = {"garbage": with_garbage_codebooks(sidecar)}
    options = {"dataset": "random", "path": "decode"}
    _, row = evaluate_caches(tiny_llama, exact, sidecars, **options)
    with torch.no_grad():
        logits = tiny_llama(exact).logits[0]
    widest = float((logits.amax(-1) - logits.amin(-1)).max())
    # Orders of summation differ: 2**-24 of the largest logit for each of some 2 * 300 operations
    # (300 tokens or fewer are summed in each of 2 layers). The KL of logits that differ by d is at
    # most d**2 / 2, to which `token_metrics` adds its own rounding.
    difference = 2.0**-24 * widest * 600
    rounding = 2.0**-23 * (widest + 4) * (1 + difference)
    assert abs(row.kl) <= difference**2 / 2 + rounding
    assert row.agreement == 1
    # The next query is the first that reads a page from its codes, and these are garbage: the mean
    # over all tokens rises by its share.
    _, row = evaluate_caches(tiny_llama, first, sidecars, **options)
    assert row.kl > 10 * (difference**2 / 2 + rounding)


@pytest.mark.parametrize(("path", "rule"), [("prefill", "evaluation"), ("decode", "runtime")])
def test_a_path_is_measured_under_its_rule(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, path: MeasuredPath, rule: str
) -> None:
    rules: list[str] = []

    @contextmanager
    def stock(model: LlamaForCausalLM, sidecar: Sidecar, *, rule: str) -> Iterator[None]:
        rules.append(rule)
        yield

    monkeypatch.setattr("kvq_evaluation.variants.attach", stock)
    sidecar = make_sidecar(tiny_llama, bits=4)
    windows = random_windows(2, 300, seed=4)
    rows = evaluate_caches(tiny_llama, windows, {"four": sidecar}, dataset="random", path=path)
    assert rules == [rule] * 2
    # Nothing but the sidecar's row is decoded; what it holds at that length is the same.
    assert [row.path for row in rows] == ["prefill", path]
    assert rows[1].to_json()["path"] == path
    assert table(rows).rows[1][-1] == path
    bits = (rows[1].effective_bits, rows[1].effective_bits_total)
    assert bits == sidecar_bits(sidecar, tokens=300)


@pytest.mark.parametrize(("sinks", "recent"), [(1, 0), (0, 0), (4, 100)])
def test_decoding_reads_codes_from_the_first_query_after_a_page(sinks: int, recent: int) -> None:
    config = KVQConfig(sink_tokens=sinks, recent_tokens=recent)
    # Sinks, the page, recent tokens, the query that reads the page, and its label.
    shortest = sinks + PAGE_TOKENS + recent + 2
    assert decoding_reads_codes(config, tokens=shortest)
    assert not decoding_reads_codes(config, tokens=shortest - 1)


def test_a_sidecar_of_another_model_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    sidecar = make_sidecar(tiny_llama, bits=4)
    record = sidecar.base_model
    other = record.fingerprint.model_copy(update={"num_kv_heads": 4})
    moved = replace(sidecar, base_model=record.model_copy(update={"fingerprint": other}))
    with pytest.raises(FingerprintMismatchError):
        evaluate_caches(
            tiny_llama, random_windows(1, 40, seed=4), {"moved": moved}, dataset="random"
        )
