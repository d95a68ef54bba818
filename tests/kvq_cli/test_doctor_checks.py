"""Single checks of ``kvq doctor``, where the command cannot show them on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvq_cli.checks import environment, kernel_trial, kernels, memory
from kvq_cli.checks.cache_memory import CacheMemory, count_cache
from kvq_cli.checks.check import Check
from kvq_cli.checks.layers import ranges
from kvq_cli.checks.stand_in import stand_in
from kvq_formats.config import KVQConfig
from kvq_kernels import pack
from kvq_runtime.memory import plan_memory
from kvq_runtime.miniature import make_miniature
from kvq_runtime.resolve import resolve_model

ROOT = Path(__file__).parents[2]


# Kernels; in Triton's interpreter.


@pytest.fixture
def trial(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Check]:
    """Of one layer. The interpreter takes nearly as long for a small tile as for a large one."""
    monkeypatch.setattr(pack, "SCALE_TILE", 2**16)
    monkeypatch.setattr(pack, "CHANNELS", 64)
    monkeypatch.setattr(pack, "CHUNK", 2**14)
    model = resolve_model(tiny_model_dir)
    model.config.num_hidden_layers = 1
    miniature = make_miniature(model.config, name="x")
    sidecar = stand_in(model.record, KVQConfig(key_bits=3, value_bits=3), {0: (0, 16)})
    place = torch.device("cpu")
    return lambda: kernel_trial.check_kernel_trial(miniature, sidecar, place, runs=True)


def test_kernels_are_tried(trial: Callable[[], Check]) -> None:
    found = trial()
    assert found.status == "pass", found.message
    assert "gives the same bytes" in found.message


def test_kernels_that_do_something_else(
    trial: Callable[[], Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    attended = kernel_trial._attended

    def reversed_heads(model: Any, sidecar: Any, impl: str) -> list[torch.Tensor]:
        outputs = attended(model, sidecar, "reference")
        return [x.flip(2) if impl == "triton" else x for x in outputs]

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(kernel_trial, "_pack_differs", lambda *_: None)
    monkeypatch.setattr(kernel_trial, "_attended", reversed_heads)
    assert "and rounding explains" in trial().message
    monkeypatch.setattr(kernel_trial, "_attended", fail)
    assert "(RuntimeError: no kernel image is available)" in trial().message
    monkeypatch.setattr(kernel_trial, "_pack_differs", lambda *_: "words of KeyPages")
    assert "gives other words of KeyPages" in trial().message
    assert trial().status == "fail"


@pytest.mark.parametrize(("needed", "expected"), [(True, "fail"), (False, "note")])
def test_a_shape_that_kernels_do_not_take(
    tiny_model_dir: Path, needed: bool, expected: str
) -> None:
    model = resolve_model(tiny_model_dir)
    shape = model.record.fingerprint.model_copy(update={"num_attention_heads": 64})
    record = model.record.model_copy(update={"fingerprint": shape})
    sidecar = stand_in(record, KVQConfig(), {0: (0, 16), 1: (0, 16)})
    miniature = make_miniature(model.config, name="x")
    found = kernels.check_kernel_shape(sidecar, miniature, needed=needed)
    assert found.status == expected
    assert "32 query heads share a key/value head" in found.message
    assert found.hint is not None
    assert "--impl reference" in found.hint


# Surroundings.


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.check_versions().status == "pass"
    monkeypatch.setattr(environment, "NEWEST_TRANSFORMERS", "5.0")
    newer = environment.check_versions()
    assert newer.status == "note"
    assert "newer than 5.0" in newer.message
    wanted = ["transformers>=99", "no-such-package-of-kvq>=1", "syrupy>=99; extra == 'dev'"]
    monkeypatch.setattr(environment, "requires", lambda _: wanted)
    older = environment.check_versions()
    assert older.status == "fail"
    assert f"transformers>=99 is needed, {version('transformers')} is installed" in older.message
    assert "syrupy" not in older.message
    assert older.hint == "pip install --upgrade 'transformers>=99' 'no-such-package-of-kvq>=1'"


def test_the_newest_version_that_was_tested_is_the_one_that_tests_run_with() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line.split("==")[1] for line in pins if line.startswith("transformers==")]
    assert pin.split(".")[:2] == environment.NEWEST_TRANSFORMERS.split(".")


def test_another_package_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.check_imports().status == "pass"
    other = tmp_path / "kvq_kernels" / "__init__.py"
    spec = SimpleNamespace(origin=str(other))
    found = environment.find_spec
    monkeypatch.setattr(
        environment, "find_spec", lambda name: spec if name == "kvq_kernels" else found(name)
    )
    clash = environment.check_imports()
    assert clash.status == "fail"
    assert f"another kvq_kernels is in the way: Python finds {other.parent}" in clash.message


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (range(36), "0-35"),
        ([7], "7"),
        (range(1, 36, 2), "1, 3, ..., 35"),
        ([1, 3, 5], "1, 3, 5"),
        ([0, 1, 2, 4, 5], "0-2, 4-5"),
        ([], ""),
    ],
)
def test_ranges(numbers: Any, expected: str) -> None:
    assert ranges(tuple(numbers)) == expected


def test_layers_of_different_widths_are_counted(tiny_model_dir: Path) -> None:
    model = resolve_model(tiny_model_dir)
    channels = {0: (0, 16), 1: (0, 16)}
    narrow, wide = (2, 2), (4, 4)

    def counted(layer_bits: dict[int, tuple[int, int]]) -> CacheMemory:
        config = KVQConfig().with_layer_bits(layer_bits)
        return count_cache(model, stand_in(model.record, config, channels), [], 1024)

    mixed, two, four = (
        counted({0: first, 1: second})
        for first, second in ((narrow, wide), (narrow, narrow), (wide, wide))
    )
    assert 2 * mixed.packed == two.packed + four.packed
    assert 2 * mixed.packed_a_token == two.packed_a_token + four.packed_a_token
    assert 2 * mixed.effective_bits == pytest.approx(two.effective_bits + four.effective_bits)
    assert two.packed < mixed.packed < four.packed


def test_bf16_has_room_for_what_is_left(tiny_model_dir: Path) -> None:
    """Weights, scratch and so many tokens fit, and one more does not."""
    model = resolve_model(tiny_model_dir)
    sidecar = stand_in(model.record, KVQConfig(), {0: (0, 16), 1: (0, 16)})
    cache = count_cache(model, sidecar, [], 1024)
    plan = plan_memory(model, sidecar, context=1024)
    room = memory._largest_stock(plan, cache)
    taken = plan.weights + plan.scratch + room * cache.bf16_a_token
    assert taken <= plan.available < taken + cache.bf16_a_token
