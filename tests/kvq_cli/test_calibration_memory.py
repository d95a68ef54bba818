"""The memory of a calibration is said before weights are loaded, and what cannot fit is refused."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvq
from kvq_calibration.data import load_text
from kvq_calibration.memory import CalibrationMemory, plan_calibration_memory
from kvq_calibration.plan import CalibrationPlan
from kvq_cli.calibration_memory import Loading, check_memory, memory_of
from kvq_cli.sizes import show_bytes
from kvq_formats.config import KVQConfig
from kvq_formats.errors import NotEnoughMemoryError
from kvq_runtime.models import resolve_model
from large_models import llama_3_8b

GIB = 2**30
CARD = 24 * 10**9


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(count: int) -> None:
        monkeypatch.setattr("kvq_calibration.memory.available_bytes", lambda _: count)

    return set_to


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", load)


def planned(model: Path, *, sensitivity: str = "fisher", **options: Any) -> CalibrationMemory:
    config = KVQConfig.create(sensitivity=sensitivity)
    given: dict[str, Any] = {"num_samples": 4, "seq_len": 1024, "batch_size": 2, **options}
    return plan_calibration_memory(resolve_model(model), config, **given)


def arguments(model: Path, text_file: Path) -> tuple[object, ...]:
    return (
        "calibrate", model, "--dataset", text_file, "--num-samples", 4, "--seq-len", 1024,
        "--batch-size", 2, "--json",
    )  # fmt: skip


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_says_it_in_rows_and_in_json(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path
) -> None:
    plan = planned(tiny_model_dir)
    found = kvq(*arguments(tiny_model_dir, text_file), "--dry-run").json["memory"]
    plain = {**plan.to_json(), "available_bytes": found["available_bytes"]}
    assert found == plain
    rows = kvq(*arguments(tiny_model_dir, text_file)[:-1], "--dry-run").stdout
    flat = " ".join(rows.split())
    assert f"weights {show_bytes(plan.weights)} + activations" in flat
    for part in ("keys and values", "gradients", "checkpoints", "one layer", "logits"):
        assert part in flat


def test_it_is_said_before_weights_are_loaded(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvq_runtime.models.load_model", load)
    ran = kvq(*arguments(tiny_model_dir, text_file)[:-1])
    assert ran.code == 130
    assert ran.stderr.startswith(
        f"Note: memory: weights {show_bytes(planned(tiny_model_dir).weights)} + activations "
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("offer", "options"),
    [
        ("--seq-len 512", {"seq_len": 512}),
        ("--batch-size 1", {"batch_size": 1}),
        ("--sensitivity none", {"sensitivity": "none"}),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, available: Callable[[int], None],
    offer: str, options: dict[str, Any],
) -> None:  # fmt: skip
    enough = planned(tiny_model_dir, **options).total
    assert enough < planned(tiny_model_dir).total
    available(enough)
    for more in ((), ("--dry-run",)):
        error = kvq(*arguments(tiny_model_dir, text_file), *more).json["error"]
        assert error["type"] == "NotEnoughMemoryError"
        assert error["message"].startswith("calibration does not fit into memory: weights ")
        assert "2 x 1024 tokens a step" in error["message"]
        assert offer in error["hint"].split(", or ")
    repaired = kvq(*arguments(tiny_model_dir, text_file), *shlex.split(offer), "--dry-run")
    assert repaired.code == 0
    available(enough - 1)
    hint = kvq(*arguments(tiny_model_dir, text_file)).json["error"]["hint"]
    assert offer not in hint.split(", or ")


@pytest.mark.usefixtures("no_weights")
def test_where_nothing_is_enough_all_that_helps_is_named(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, available: Callable[[int], None]
) -> None:
    available(1000)
    hint = kvq(*arguments(tiny_model_dir, text_file)).json["error"]["hint"]
    named = ("--batch-size 1", "--load-in-4bit", "--sensitivity none", "--seq-len 256")
    assert hint == ", with ".join(named)


def plan_8b(text_file: Path, **options: Any) -> CalibrationPlan:
    source = load_text(str(text_file), purpose="calibrate")
    given = {"num_samples": 16, "seq_len": 2048, "seed": 0, "config": KVQConfig.create()}
    return CalibrationPlan(model=llama_3_8b(), source=source, **{**given, **options})


def test_eight_billion_weights_on_smaller_cards(
    text_file: Path, available: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if there were a GPU, and a host with 64 GiB beside it.
    monkeypatch.setattr("kvq_calibration.memory.target_device", lambda name: name or "cuda")
    plan, loading = plan_8b(text_file), Loading()
    available(CARD)
    assert check_memory(plan, loading, batch_size=1).fits
    # Counted as if all were on the card: 2.3 GiB are histograms and fitting, on the host.
    assert memory_of(plan, loading, batch_size=1, load_in="4bit").total < 9 * GIB

    def free(place: str) -> int:
        return (16 if place == "cuda" else 80) * 10**9

    monkeypatch.setattr("kvq_calibration.memory.available_bytes", free)
    with pytest.raises(NotEnoughMemoryError, match=r"weights 15\.0 GiB") as caught:
        check_memory(plan, loading, batch_size=1)
    # Weights alone are too large: shorter windows do not help, and no gradients do not either.
    assert caught.value.hint == "--load-in-4bit, or --device-map auto"


def test_a_missing_bitsandbytes_is_said_before_anything_is_counted(
    kvq: Kvq, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvq_runtime.weight_quantization.find_spec", lambda _: None)
    ran = kvq("calibrate", tiny_model_dir, "--load-in-4bit", "--dry-run", "--json")
    assert ran.json["error"]["hint"] == "pip install bitsandbytes"
