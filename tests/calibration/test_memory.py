"""What calibration is planned to hold, against what it was seen to hold.

The plan is an upper bound of live tensor bytes. ``MARGIN`` says how far above it may be: moments
that do not fall together are taken from one list for all families, so that the bound of a norm,
say, counts four fp32 copies where some write two.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration import token_loss
from kvq_calibration.capture import evaluation_mode
from kvq_calibration.memory import (
    CalibrationMemory,
    count_activations,
    plan_calibration_memory,
)
from kvq_calibration.pipeline import find_thresholds, fit_layer, measure_points
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError
from kvq_formats.progress import SilentProgress
from kvq_runtime.models import quantized_layers
from large_models import described, llama_3_8b
from peak_bytes import PeakBytes
from tiny_models import make_tiny_family, make_tiny_llama

MARGIN = 1.5
SEQ_LEN = 96
WITH_PAGES = 600
"""Tokens of a window with queries beyond its first page, and beyond its second."""

WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 512}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**WIDE, "intermediate_size": 768}),
    "a large vocabulary": ("llama", {"vocab_size": 16_000}),
    "many layers": ("llama", {"num_hidden_layers": 12}),
    "experts": ("mixtral", {**WIDE, **EXPERTS}),
    "small experts": (
        "qwen3_moe",
        {**WIDE, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
    ),
    "biased experts": ("gpt_oss", {**WIDE, **EXPERTS, "sliding_window": 64}),
    "soft-caps": (
        "gemma2",
        {**WIDE, "intermediate_size": 512, "sliding_window": 64, "vocab_size": 4000},
    ),
    "norms of keys": ("qwen3", {**WIDE, "intermediate_size": 768}),
    "fused projections": ("phi3", {**WIDE, "intermediate_size": 768}),
    "no gate, a part of keys rotated": (
        "stablelm",
        {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512},
    ),
}


def peaks(model: PreTrainedModel, config: KVQConfig, windows: Tensor, batch: int) -> list[int]:
    """Peaks of both passes and of the fitting, bytes."""
    layers = quantized_layers(model.config)
    options: dict[str, Any] = {"batch_size": batch, "progress": SilentProgress()}
    with evaluation_mode(model):
        with PeakBytes() as first:
            thresholds = find_thresholds(model, windows, config, layers, **options)[0]
        with PeakBytes() as second:
            points = measure_points(model, windows, config, thresholds, **options)
    held = second.live
    with PeakBytes() as fitting:
        fit_layer(points[layers[0]], thresholds[layers[0]], config)
    return [first.peak, second.peak, held + fitting.peak]


def planned(model: PreTrainedModel, config: KVQConfig, **sizes: int) -> CalibrationMemory:
    counted = count_activations(model, config, **sizes)
    return CalibrationMemory(
        seq_len=sizes["seq_len"], batch_size=sizes["batch_size"], sensitivity=config.sensitivity,
        device="cpu", weights=0, available=0, **counted,
    )  # fmt: skip


def assert_bounded(
    model: PreTrainedModel, config: KVQConfig, windows: Tensor, batch_size: int
) -> tuple[CalibrationMemory, int]:
    """The plan bounds both passes; it, and the peak of the fitting."""
    num_samples, seq_len = windows.shape
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size}
    plan = planned(model, config, **sizes)
    first, second, third = peaks(model, config, windows, batch_size)
    assert first <= plan.first_pass <= MARGIN * first
    assert second <= plan.second_pass <= MARGIN * second
    return plan, third


@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
@pytest.mark.parametrize(
    ("dtype", "batch_size"), [(torch.float32, 1), (torch.bfloat16, 3)], ids=["f32-1", "bf16-3"]
)
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_bounds_what_is_measured(
    name: str,
    dtype: torch.dtype,
    batch_size: int,
    sensitivity: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A chunk is a small part of the logits, as with real models.
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", 2**13)
    family, options = MODELS[name]
    model = make_tiny_family(family, **options).to(dtype)
    config = KVQConfig.create(key_bits=3, value_bits=3, sensitivity=sensitivity)
    windows = torch.randint(3, 190, (2 * batch_size, SEQ_LEN))
    assert_bounded(model, config, windows, batch_size)


@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq_len", [256, WITH_PAGES])
def test_scores_that_are_written_down(dtype: torch.dtype, seq_len: int, sensitivity: str) -> None:
    model = make_tiny_family("llama", **WIDE, intermediate_size=512).to(dtype)
    model.set_attn_implementation("eager")
    config = KVQConfig.create(key_bits=3, value_bits=3, sensitivity=sensitivity)
    windows = torch.randint(3, 190, (2, seq_len))
    assert_bounded(model, config, windows, 1)


@pytest.mark.parametrize(
    ("dtype", "batch_size"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=["f32-1", "bf16-2"]
)
@pytest.mark.parametrize("name", MODELS)
def test_windows_with_later_pages(
    name: str, dtype: torch.dtype, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients through later pages' queries, and what one layer is fitted in."""
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", 2**13)
    family, options = MODELS[name]
    model = make_tiny_family(family, **options).to(dtype)
    config = KVQConfig.create(key_bits=3, value_bits=3)
    windows = torch.randint(3, 190, (2 * batch_size, WITH_PAGES))
    plan, third = assert_bounded(model, config, windows, batch_size)
    assert third <= plan.third_pass <= MARGIN * third


GIB = 2**30
CARD = 24 * 10**9
"""What a card that is sold as 24 GB has at least."""


def plan_8b(monkeypatch: pytest.MonkeyPatch, **options: Any) -> CalibrationMemory:
    monkeypatch.setattr("kvq_calibration.memory.available_bytes", lambda _: CARD)
    config = KVQConfig.create(sensitivity=options.pop("sensitivity", "fisher"))
    given = {"num_samples": 16, "seq_len": 2048, "device_map": "cpu", **options}
    return plan_calibration_memory(llama_3_8b(), config, **given)


def test_eight_billion_weights_on_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/troubleshooting.md."""
    bf16, in_4_bits = plan_8b(monkeypatch), plan_8b(monkeypatch, load_in="4bit")
    light = plan_8b(monkeypatch, sensitivity="none")
    assert bf16.fits
    found = [
        round(count / GIB, 1)
        for plan in (bf16, in_4_bits, light)
        for count in (plan.weights, plan.activations, plan.total)
    ]
    assert found == [15.0, 3.3, 18.2, 5.6, 3.3, 8.9, 15.0, 0.6, 15.5]
    # 32 layers of 2,048 tokens, 1,024 channels of keys and as many of values, in bf16.
    assert bf16.keys_and_values == 32 * 2048 * 2 * 1024 * 2
    # As many gradients, and as many through queries of later pages.
    assert bf16.gradients == 2 * bf16.keys_and_values
    # Of 16 * 2,047 tokens every 8th key and every 2nd value, with f32 energies of 8 heads.
    samples = 32 * (4094 + 16_376) * (1024 * 2 + 8 * 4)
    moments = 32 * 4 * 8 * 128 * 128 * 8
    assert bf16.histograms == light.histograms + samples + moments
    # No far gradients, where there is no page after the first.
    short = plan_8b(monkeypatch, seq_len=257)
    assert short.gradients == short.keys_and_values
    assert light.fitting == 0
    assert bf16.checkpoints == 34 * 2048 * 4096 * 2
    # Two tensors of 2,048 x 128,256 in bf16; 64 MiB of chunks and the last hidden state beside.
    assert bf16.logits == pytest.approx(2 * 2048 * 128_256 * 2, rel=0.15)


def test_more_of_everything_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_8b(monkeypatch)
    for options in ({"seq_len": 4096}, {"batch_size": 2}, {"attn_implementation": "eager"}):
        assert plan_8b(monkeypatch, **options).activations > plan.activations
    # No more windows than there are.
    few = plan_8b(monkeypatch, num_samples=1)
    assert plan_8b(monkeypatch, num_samples=1, batch_size=8).activations == few.activations


def test_json_and_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_8b(monkeypatch)
    found = plan.to_json()
    assert plan.total == plan.weights + max(plan.first_pass, plan.second_pass, plan.third_pass)
    assert found["total_bytes"] == plan.total
    assert found["fits"] is True
    assert found["available_bytes"] == CARD


def test_a_type_that_there_is_not() -> None:
    model = described(make_tiny_llama().config)
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        plan_calibration_memory(model, KVQConfig.create(), num_samples=1, seq_len=8, dtype="int8")
