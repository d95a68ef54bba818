from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvq_runtime.models
from kvq_calibration.plan import calibrate_from_text, plan_calibration
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError, DataError, UnsupportedModelError
from kvq_runtime.models import load_model, resolve_model

SMALL = {"num_samples": 2, "seq_len": 128}


def test_a_plan_loads_no_weights(
    tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(kvq_runtime.models, "load_model", no_weights)
    resolved = resolve_model(tiny_model_dir)
    plan = plan_calibration(resolved, config=KVQConfig(), dataset=str(text_file), seq_len=5000)
    assert plan.seq_len == 1024
    assert plan.notes == ("--seq-len 5000 is clamped to the model's 1024 positions",)
    # Too little text is found out before the weights, too.
    with pytest.raises(DataError, match="too little text"):
        plan_calibration(
            resolved, config=KVQConfig(), dataset=str(text_file), num_samples=10_000
        ).run()


def test_a_name_and_a_loaded_model_give_the_same_codebooks(
    tiny_model_dir: Path, text_file: Path
) -> None:
    by_name = calibrate_from_text(tiny_model_dir, bits=3, dataset=str(text_file), **SMALL)
    loaded = load_model(resolve_model(tiny_model_dir))
    by_object = calibrate_from_text(loaded.model, bits=3, dataset=str(text_file), **SMALL)
    assert by_object.base_model == by_name.base_model
    assert by_object.calibration == by_name.calibration
    for layer, parameters in by_name.layers.items():
        other = by_object.layers[layer]
        assert torch.equal(parameters.key.codebook.entries, other.key.codebook.entries)
        assert torch.equal(parameters.key.center, other.key.center)


def test_bits_or_a_whole_configuration(tiny_model_dir: Path, text_file: Path) -> None:
    config = KVQConfig(key_bits=2, value_bits=3, sensitivity="none")
    made = calibrate_from_text(tiny_model_dir, config=config, dataset=str(text_file), **SMALL)
    assert made.config == config
    with pytest.raises(ConfigError, match="both"):
        calibrate_from_text(tiny_model_dir, bits=3, config=config)
    with pytest.raises(ConfigError, match="key_bits is 9"):
        calibrate_from_text(tiny_model_dir, bits=9)


def test_notes_reach_the_caller(tiny_model_dir: Path, text_file: Path) -> None:
    heard: list[str] = []
    calibrate_from_text(
        tiny_model_dir, dataset=str(text_file), num_samples=1, seq_len=2000, on_note=heard.append
    )
    assert heard == ["--seq-len 2000 is clamped to the model's 1024 positions"]


def test_a_loaded_model_that_is_not_understood_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError):
        calibrate_from_text(model)
