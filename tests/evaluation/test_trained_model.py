"""What only a trained model can show: how much of its perplexity hangs on the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from garbage import with_garbage_codebooks
from kvq_calibration.data import load_text, token_windows
from kvq_calibration.pipeline import calibrate
from kvq_evaluation.baselines.int_per_token import IntPerToken
from kvq_evaluation.caches import evaluate_caches
from kvq_evaluation.perplexity import evaluate
from kvq_evaluation.rescale import outlier_channels
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.embedded import embedded_model_path
from kvq_runtime.evaluation_rule import attach_codec

EMBEDDED = embedded_model_path()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def calibration_windows() -> Tensor:
    source = load_text("builtin", purpose="calibrate")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return token_windows(tokenizer, source, num_windows=2, seq_len=512).input_ids


@pytest.fixture(scope="module")
def dev_window() -> Tensor:
    """One window of more than four pages."""
    source = load_text("builtin:dev", purpose="eval")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    cut = token_windows(tokenizer, source, num_windows=1, seq_len=4 * PAGE_TOKENS + 100)
    return cut.input_ids


def three_bits(model: LlamaForCausalLM, windows: Tensor) -> Sidecar:
    fingerprint = Fingerprint.from_config(model.config.to_dict())
    return calibrate(
        model,
        windows,
        KVQConfig(key_bits=3, value_bits=3),
        base_model=BaseModelRecord(id="embedded", revision=None, fingerprint=fingerprint),
        calibration=CalibrationRecord(
            dataset="builtin", revision=None, num_samples=2, seq_len=512, seed=0, token_sha256="0"
        ),
    )


def test_garbage_codebooks_wreck_perplexity(
    model: LlamaForCausalLM, calibration_windows: Tensor, dev_window: Tensor
) -> None:
    sidecar = three_bits(model, calibration_windows)
    sidecars = {"3 bit": sidecar, "garbage": with_garbage_codebooks(sidecar)}
    unquantized, ours, garbage = evaluate_caches(model, dev_window, sidecars, dataset="dev")
    assert ours.perplexity < 1.1 * unquantized.perplexity
    assert garbage.perplexity > 2 * unquantized.perplexity
    assert garbage.kl > 20 * ours.kl


def test_garbage_codebooks_wreck_decoding(
    model: LlamaForCausalLM, calibration_windows: Tensor, dev_window: Tensor
) -> None:
    sidecar = three_bits(model, calibration_windows)
    sidecars = {"3 bit": sidecar, "garbage": with_garbage_codebooks(sidecar)}
    # Half of the queries have a page behind them that they read from codes. This model attends to
    # its own page for the most part, which is exact.
    window = dev_window[:, : 2 * PAGE_TOKENS + 40]
    unquantized, ours, garbage = evaluate_caches(
        model, window, sidecars, dataset="dev", path="decode"
    )
    assert ours.perplexity < 1.02 * unquantized.perplexity
    assert garbage.perplexity > 1.04 * unquantized.perplexity
    assert garbage.kl > 100 * ours.kl


def test_wide_channels_hurt_codes_a_token_and_not_ours(
    model: LlamaForCausalLM, calibration_windows: Tensor, dev_window: Tensor
) -> None:
    def divergences() -> tuple[float, float]:
        codec = IntPerToken(bits=3, layers=range(model.config.num_hidden_layers))
        _, uniform = evaluate(
            model, dev_window, variants={"int3": lambda: attach_codec(model, codec)}
        )
        sidecar = three_bits(model, calibration_windows)
        _, ours = evaluate_caches(model, dev_window, {"3 bit": sidecar}, dataset="dev")
        return uniform.mean_kl.mean, ours.kl

    uniform, ours = divergences()
    with outlier_channels(model, key_pairs=2, value_channels=0):
        wide_uniform, wide_ours = divergences()
    # Codebooks follow the channels' ranges: only roundings differ.
    assert wide_ours < 1.1 * ours
    assert wide_uniform > 2 * uniform
    assert wide_uniform > 10 * wide_ours
