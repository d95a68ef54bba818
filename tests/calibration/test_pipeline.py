"""Windows in, sidecar out: right, deterministic, and honest about what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration import pipeline
from kvq_calibration.pipeline import calibrate
from kvq_calibration.points import NormalisedPoints
from kvq_formats.config import KVQConfig
from kvq_formats.errors import CalibrationError, DataError
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach
from tiny_models import make_tiny_family, make_tiny_llama

RECORD = CalibrationRecord(
    dataset="test", revision=None, num_samples=6, seq_len=64, seed=0, token_sha256="0" * 64
)


def windows(*, num: int = 6, seq_len: int = 64, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 190, (num, seq_len), generator=generator)


def run(model: PreTrainedModel, ids: Tensor | None = None, **options: Any) -> Sidecar:
    config = KVQConfig.create(**{"key_bits": 3, "value_bits": 3, **options})
    base = BaseModelRecord(
        id="test/tiny", revision=None, fingerprint=Fingerprint.from_config(model.config.to_dict())
    )
    ids = windows() if ids is None else ids
    return calibrate(model, ids, config, base_model=base, calibration=RECORD, batch_size=2)


def divergence(model: PreTrainedModel, sidecar: Sidecar) -> float:
    """Mean KL to the model without quantization, nats a token."""
    ids = windows(num=2, seq_len=400, seed=9)
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        with attach(model, sidecar, rule="evaluation"):
            q = model(ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_thresholds_codebooks_and_steps_are_there_for_every_layer() -> None:
    sidecar = run(make_tiny_llama(), key_bits=2, value_bits=4, range_margin=1.0)
    assert sorted(sidecar.layers) == [0, 1]
    for layer in sidecar.layers.values():
        assert layer.key.center.shape == layer.key.half_range.shape == (2, 16)
        assert layer.key.codebook.entries.shape == (4,)
        assert layer.value.codebook.entries.shape == (16,)
        assert (layer.key.codebook.entries.diff() > 0).all()
        assert layer.key.outlier_step > 0
        assert layer.value.outlier_step > 0
    for statistics in sidecar.statistics.values():
        # Two quantiles of 6 * 63 tokens leave one or two tokens outside at each end.
        assert 0.004 <= statistics.key_outlier_share <= 0.012
        # One at each end of a token's 32 values.
        assert statistics.value_outlier_share == pytest.approx(2 / 32)
        assert 0 < statistics.value_error < statistics.key_error < 1


def test_the_same_inputs_give_the_same_bytes() -> None:
    first, second = run(make_tiny_llama()), run(make_tiny_llama())
    assert first._files() == second._files()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_only_change_rounding(batch_size: int) -> None:
    model = make_tiny_llama()
    expected = run(model)
    config = expected.config
    found = calibrate(
        model,
        windows(),
        config,
        base_model=expected.base_model,
        calibration=RECORD,
        batch_size=batch_size,
    )
    for layer in expected.layers:
        ours, theirs = found.layers[layer], expected.layers[layer]
        torch.testing.assert_close(ours.key.center, theirs.key.center, rtol=1e-4, atol=1e-5)
        # Sums come in another order; a point near a bin's edge may change its bin.
        gap = ours.key.codebook.entries - theirs.key.codebook.entries
        assert gap.abs().max() < 2 * 2 / 4096 + 1e-3


@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
@pytest.mark.parametrize("kmeans", ["exact", "sklearn"])
def test_more_bits_are_closer_to_the_model(sensitivity: str, kmeans: str) -> None:
    model = make_tiny_llama()
    options = {"sensitivity": sensitivity, "kmeans": kmeans}
    found = [
        divergence(model, run(model, key_bits=bits, value_bits=bits, **options))
        for bits in (2, 3, 4)
    ]
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "phi3"])
def test_other_projections_and_norms(model_type: str) -> None:
    model = make_tiny_family(model_type)
    four, two = (run(model, key_bits=bits, value_bits=bits) for bits in (4, 2))
    assert divergence(model, four) < divergence(model, two) / 3


def test_a_constant_key_bias_costs_nothing() -> None:
    """A bias is constant before RoPE, so that the centre takes it away (Qwen2)."""
    plain, shifted = make_tiny_family("qwen2"), make_tiny_family("qwen2")
    bias = 20.0 * torch.randn(32, generator=torch.Generator().manual_seed(1)).sign()
    with torch.no_grad():
        for layer in shifted.model.layers:
            layer.self_attn.k_proj.bias += bias
    for layer, other in zip(run(plain).layers.values(), run(shifted).layers.values(), strict=True):
        # The bias changes attention, so ranges agree in size only; they do not grow with the bias.
        ratio = other.key.half_range.mean() / layer.key.half_range.mean()
        assert 0.5 < ratio < 2
        assert float(other.key.center.abs().mean()) > 10
    first = shifted.model.layers[0].self_attn
    assert run(shifted).layers[0].key.center.flatten().sub(first.k_proj.bias).abs().max() < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    exact = run(make_tiny_llama())
    half = run(make_tiny_llama().to(dtype))
    for layer in exact.layers:
        ours, theirs = half.layers[layer].key, exact.layers[layer].key
        assert torch.isfinite(ours.center).all()
        ratio = ours.half_range / theirs.half_range
        assert 0.9 < ratio.median() < 1.1
        assert (ours.codebook.entries - theirs.codebook.entries).abs().max() < 0.15


def test_qnorm_is_folded_into_the_decode_codebook() -> None:
    # Without feedback: codebooks of targets depend on what codes decode to.
    plain, normed = (run(make_tiny_llama(), qnorm=on, feedback=False) for on in (False, True))
    a, b = plain.layers[0].value.codebook, normed.layers[0].value.codebook
    assert torch.equal(a.entries, b.entries)
    assert (a.qnorm_scale, a.qnorm_shift) == (1.0, 0.0)
    moved = a.entries * b.qnorm_scale + b.qnorm_shift
    assert b.qnorm_scale > 1
    assert (b.decode_entries - moved).abs().max() <= b.step / 2 + 1e-6


def test_sinks_do_not_count() -> None:
    model = make_tiny_llama()
    ids = windows()
    huge = ids.clone()
    huge[:, 0] = 7
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 0
        model.get_input_embeddings().weight[7, 0] = 1000.0
    ids[:, 0] = 8
    wide = run(model, huge, sink_tokens=0).layers[0].key.half_range
    kept = run(model, huge, sink_tokens=1).layers[0].key.half_range
    other = run(model, ids, sink_tokens=1).layers[0].key.half_range
    # Layer 0 sees embeddings only: without its sink it is blind to what the sink was.
    assert torch.equal(kept, other)
    assert not torch.equal(kept, wide)


def test_what_is_held_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between batches only histograms and moments are alive, of the same size for any text."""

    def held(points: NormalisedPoints) -> int:
        sides = (points.weighted.moments, points.counted.moments)
        return sum(t.nbytes for t in sides) + points.outliers.weight.nbytes

    sizes: dict[int, set[int]] = {}
    original = pipeline._add_layer

    def watched(points: Any, *args: Any) -> None:
        original(points, *args)
        moments = (points.key_moments.total, points.value_moments.total)
        bins = held(points.key) + held(points.value)
        sizes.setdefault(num, set()).add(bins + sum(moment.nbytes for moment in moments))

    monkeypatch.setattr(pipeline, "_add_layer", watched)
    for num in (2, 8):
        run(make_tiny_llama(), windows(num=num))
    assert sizes[2] == sizes[8]
    assert len(sizes[8]) == 1


def test_a_channel_that_hardly_ever_moves_is_no_trouble() -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[4:6] = 0
            layer.self_attn.v_proj.weight[3] = 0
        # Layer 0 sees embeddings: one rare token moves the dead channel far.
        model.get_input_embeddings().weight[:, 9] = 0
        model.get_input_embeddings().weight[150, 9] = 1.0
        model.model.layers[0].self_attn.k_proj.weight[5, 9] = 1e4
    sidecar = run(model)
    half_range = sidecar.layers[0].key.half_range
    assert (half_range > 0).all()
    assert divergence(model, sidecar) < 1


def test_each_module_keeps_its_mode() -> None:
    model = make_tiny_llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    run(model, windows(num=2))
    assert [module.training for module in model.modules()] == modes


def test_nan_activations_name_the_layer() -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match=r"keys of layer 1 hold .* NaN") as error:
        run(model)
    assert error.value.hint


@pytest.mark.parametrize("shape", [(0, 64), (4, 2)])
def test_windows_without_tokens_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="at least 3 tokens"):
        run(make_tiny_llama(), torch.full(shape, 5))


def test_the_model_is_left_as_it_was_after_a_failure() -> None:
    model = make_tiny_llama()
    model.train()
    before = model.config._attn_implementation

    class Stopping:
        @contextmanager
        def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
            def advance() -> None:
                if name == "sensitivity":
                    raise KeyboardInterrupt

            yield advance

    with pytest.raises(KeyboardInterrupt):
        calibrate(
            model,
            windows(),
            KVQConfig(),
            base_model=run(make_tiny_llama()).base_model,
            calibration=RECORD,
            progress=Stopping(),
        )
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == before
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_key_channels_are_wider_by_the_margin() -> None:
    model = make_tiny_llama()
    plain, wide = run(model, range_margin=1.0), run(model)
    assert wide.config.range_margin == 1.2
    for layer, ours in wide.layers.items():
        theirs = plain.layers[layer]
        assert torch.equal(ours.key.center, theirs.key.center)
        torch.testing.assert_close(ours.key.half_range, 1.2 * theirs.key.half_range)
        assert wide.statistics[layer].key_outlier_share < plain.statistics[layer].key_outlier_share
