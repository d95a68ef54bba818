"""Feedback in a sidecar's file: kept to the bit, absent from older files, refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvq_formats import sidecar_tensors
from kvq_formats.config import KVQConfig
from kvq_formats.errors import SidecarError
from kvq_formats.feedback import Feedback
from kvq_formats.parameters import LayerParameters
from kvq_formats.sidecar import Sidecar
from kvq_formats.sidecar_header import document_sha256
from kvq_formats.sidecar_tensors import layer_tensors
from tiny_sidecars import make_sidecar

H, D = 2, 16
GAINS = D * (D - 1) // 2
ORDER, GAIN = "layers.1.key.feedback_order", "layers.1.value.feedback_gains"
SHIFT = "layers.1.value.feedback_shift"


def random_feedback(seed: int) -> Feedback:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(D, generator=generator) for _ in range(H)])
    gains = torch.randn(H, GAINS, generator=generator).half()
    return Feedback(order, gains, torch.randn(H, D, generator=generator))


def with_feedback(sidecar: Sidecar) -> Sidecar:
    """Another one for the keys and values of each layer."""
    layers = {
        index: LayerParameters(
            replace(layer.key, feedback=random_feedback(2 * index)),
            replace(layer.value, feedback=random_feedback(2 * index + 1)),
        )
        for index, layer in sidecar.layers.items()
    }
    return replace(sidecar, layers=layers)


Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def saved_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Path]:
    """Save a sidecar whose tensors were changed first, so that its hashes are right."""

    def save(change: Change) -> Path:
        tensors = layer_tensors(with_feedback(make_sidecar()).layers)
        change(tensors)
        with monkeypatch.context() as patched:
            patched.setattr(sidecar_tensors, "layer_tensors", lambda _: tensors)
            return make_sidecar().save(tmp_path / "changed")

    return save


def test_feedback_round_trips_to_the_bit(tmp_path: Path) -> None:
    sidecar = with_feedback(make_sidecar())
    loaded = Sidecar.load(sidecar.save(tmp_path / "s"))
    for index, layer in sidecar.layers.items():
        for before, after in (
            (layer.key.feedback, loaded.layers[index].key.feedback),
            (layer.value.feedback, loaded.layers[index].value.feedback),
        ):
            assert before is not None
            assert after is not None
            assert after.order.dtype == torch.int64
            assert torch.equal(after.order, before.order)
            assert after.gains.dtype == torch.float16
            assert torch.equal(after.gains, before.gains)
            assert after.shift.dtype == torch.float32
            assert torch.equal(after.shift, before.shift)
    first, again = (tmp_path / "s", loaded.save(tmp_path / "again"))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_in_the_file_it_is_three_tensors(tmp_path: Path) -> None:
    directory = with_feedback(make_sidecar()).save(tmp_path / "s")
    tensors = load_file(directory / "kvq.safetensors")
    names = {name for name in tensors if "feedback" in name}
    assert names == {
        f"layers.{layer}.{kind}.feedback_{part}"
        for layer in (0, 1)
        for kind in ("key", "value")
        for part in ("order", "gains", "shift")
    }
    parts = {
        "order": (torch.int16, D),
        "gains": (torch.float16, GAINS),
        "shift": (torch.float32, D),
    }
    for name in names:
        dtype, columns = parts[name.rpartition("_")[2]]
        assert tensors[name].dtype == dtype
        assert tensors[name].shape == (H, columns)


def test_feedback_may_be_of_keys_or_values_alone(tmp_path: Path) -> None:
    whole = with_feedback(make_sidecar())
    first, second = whole.layers[0], whole.layers[1]
    mixed = {
        0: replace(first, key=replace(first.key, feedback=None)),
        1: replace(second, value=replace(second.value, feedback=None)),
    }
    loaded = Sidecar.load(replace(whole, layers=mixed).save(tmp_path / "s"))
    found = [
        (layer.key.feedback is None, layer.value.feedback is None)
        for _, layer in sorted(loaded.layers.items())
    ]
    assert found == [(True, False), (False, True)]


def test_unchanged_tensors_load(saved_with: Callable[[Change], Path]) -> None:
    assert Sidecar.load(saved_with(lambda tensors: None)).layers[1].key.feedback is not None


def twice(tensors: dict[str, Tensor]) -> None:
    tensors[ORDER][1, 3] = tensors[ORDER][1, 4]


def one_more(tensors: dict[str, Tensor]) -> None:
    tensors[ORDER] += 1


def negative(tensors: dict[str, Tensor]) -> None:
    tensors[ORDER] -= 1


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def spoilt(name: str, number: float) -> Change:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 7] = number

    return spoil


def without(kind: str, *parts: str) -> Change:
    """Lacks these parts of the feedback of layer 1's keys or values."""

    def take_away(tensors: dict[str, Tensor]) -> None:
        for part in parts:
            del tensors[f"layers.1.{kind}.feedback_{part}"]

    return take_away


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(ORDER), "its tensor layers.1.key.feedback_order is missing"),
        (lambda tensors: tensors.pop(GAIN), "its tensor layers.1.value.feedback_gains is missing"),
        (twice, "key.feedback_order does not name every channel once"),
        (one_more, "key.feedback_order does not name every channel once"),
        (negative, "key.feedback_order does not name every channel once"),
        (without("value", "order"), "layers.1.value.feedback_order is missing"),
        (without("value", "order", "gains"), "layers.1.value.feedback_gains is missing"),
        (without("value", "order", "shift"), "layers.1.value.feedback_order is missing"),
        (spoilt(GAIN, torch.inf), "value.feedback_gains has an entry that is not finite"),
        (spoilt(GAIN, torch.nan), "value.feedback_gains has an entry that is not finite"),
        (spoilt(SHIFT, torch.inf), "value.feedback_shift has an entry that is not finite"),
        (spoilt(SHIFT, torch.nan), "value.feedback_shift has an entry that is not finite"),
        (
            put(SHIFT, lambda shift: shift[:, :-1].contiguous()),
            "feedback_shift is torch.float32 [2, 15], expected torch.float32 [2, 16]",
        ),
        (
            put(SHIFT, lambda shift: shift.half()),
            "feedback_shift is torch.float16 [2, 16], expected torch.float32 [2, 16]",
        ),
        (
            put(ORDER, lambda order: order[:, :-1].contiguous()),
            "feedback_order is torch.int16 [2, 15], expected torch.int16 [2, 16]",
        ),
        (
            put(ORDER, lambda order: order[:1].contiguous()),
            "feedback_order is torch.int16 [1, 16], expected torch.int16 [2, 16]",
        ),
        (
            put(ORDER, lambda order: order.float()),
            "feedback_order is torch.float32 [2, 16], expected torch.int16 [2, 16]",
        ),
        (
            put(GAIN, lambda gains: gains[:, :-1].contiguous()),
            "feedback_gains is torch.float16 [2, 119], expected torch.float16 [2, 120]",
        ),
        (
            put(GAIN, lambda gains: gains.float()),
            "feedback_gains is torch.float32 [2, 120], expected torch.float16 [2, 120]",
        ),
        (
            lambda tensors: tensors.update({"layers.0.key.feedback": torch.zeros(1)}),
            "it has a tensor layers.0.key.feedback that no sidecar has",
        ),
    ],
)
def test_feedback_that_no_calibration_wrote(
    saved_with: Callable[[Change], Path], change: Change, message: str
) -> None:
    with pytest.raises(SidecarError) as caught:
        Sidecar.load(saved_with(change))
    assert message in str(caught.value)
    assert "damaged or was altered" in str(caught.value)
    assert "calibrate again" in (caught.value.hint or "")


def test_a_gain_that_was_edited_is_found_by_the_hash(tmp_path: Path) -> None:
    file = with_feedback(make_sidecar()).save(tmp_path / "s") / "kvq.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as reader:
        metadata = dict(reader.metadata())
    tensors[GAIN][0, 0] += 1
    save_file(tensors, file, metadata)
    with pytest.raises(SidecarError, match="hash of its tensors"):
        Sidecar.load(file)


# Files from before there were shifts, feedback and a margin


def no_shifts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("feedback_shift")]:
        del tensors[name]


@pytest.mark.parametrize("change", [no_shifts, without("value", "shift")])
def test_an_older_sidecar_has_feedback_without_shifts(
    saved_with: Callable[[Change], Path], change: Change
) -> None:
    loaded = Sidecar.load(saved_with(change)).layers[1].value.feedback
    written = with_feedback(make_sidecar()).layers[1].value.feedback
    assert loaded is not None
    assert written is not None
    assert torch.equal(loaded.order, written.order)
    assert torch.equal(loaded.gains, written.gains)
    assert loaded.shift.dtype == torch.float32
    assert torch.equal(loaded.shift, torch.zeros(H, D))


def without_the_words(directory: Path) -> Path:
    """Both documents as they were written before the options were there."""
    file, readable = directory / "kvq.safetensors", directory / "kvq_config.json"
    with safe_open(file, framework="pt") as reader:
        metadata = dict(reader.metadata())
    document: dict[str, Any] = json.loads(metadata["kvq_config"])
    del document["config"]["feedback"], document["config"]["range_margin"]
    document["document_sha256"] = document_sha256(document)
    metadata["kvq_config"] = json.dumps(document)
    save_file(load_file(file), file, metadata)
    readable.write_text(metadata["kvq_config"])
    return directory


def test_an_older_sidecar_has_no_feedback_and_no_margin(tmp_path: Path) -> None:
    assert KVQConfig().feedback
    older = without_the_words(make_sidecar().save(tmp_path / "older"))
    assert not Sidecar.peek(older).config.feedback
    loaded = Sidecar.load(older)
    assert not loaded.config.feedback
    assert loaded.config.range_margin == 1
    for layer in loaded.layers.values():
        assert layer.key.feedback is None
        assert layer.value.feedback is None
    # Saved again it says so.
    again = loaded.save(tmp_path / "again")
    document = json.loads((again / "kvq_config.json").read_text())
    assert document["config"]["feedback"] is False
    assert not Sidecar.load(again).config.feedback


@pytest.mark.parametrize("feedback", [False, True])
def test_the_option_is_kept(tmp_path: Path, feedback: bool) -> None:
    directory = make_sidecar(feedback=feedback).save(tmp_path / "s")
    assert Sidecar.load(directory).config.feedback == feedback
