"""The memory plan counts what is then allocated, and what comes and goes at the worst moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from kvq_formats.config import LARGEST_CONTEXT, PAGE_TOKENS
from kvq_formats.errors import ConfigError, SidecarError
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, packed_layers
from kvq_runtime.memory import MemoryPlan, plan_memory
from kvq_runtime.page_codec import SidecarPageCodec
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

MIB = 2**20


@pytest.mark.parametrize("context", [1, 255, 256, 257, 258, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cache_takes_what_is_planned(context: int, batch_size: int) -> None:
    model, sidecar = make_tiny_llama(), make_sidecar(3)
    plan = plan_memory(model, sidecar, context=context, batch_size=batch_size)
    cache = PackedCache(model, sidecar, capacity=context, batch_size=batch_size)
    assert plan.cache == cache.allocated_bytes
    # 2 layers, keys and values, 2 heads of 16, 2 bytes.
    assert plan.bf16_cache == batch_size * context * 2 * 2 * 2 * 16 * 2


def test_a_folder_and_its_model_have_one_plan(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    sidecar = make_sidecar(3, model=model)
    sidecar.save(tmp_path / "q")
    planned = plan_memory(tiny_model_dir, tmp_path / "q", context=4096)
    loaded = plan_memory(model, sidecar, context=4096)
    sizes = ("weights", "cache", "scratch", "bf16_cache", "total", "context", "device")
    assert {name: getattr(planned, name) for name in sizes} == {
        name: getattr(loaded, name) for name in sizes
    }
    assert (planned.weights_loaded, loaded.weights_loaded) == (False, True)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert planned.weights == sum(tensors.values())
    assert planned.total == planned.weights + planned.cache + planned.scratch
    half = plan_memory(tiny_model_dir, sidecar, context=4096, dtype="bfloat16")
    assert half.weights < planned.weights
    assert half.cache < planned.cache


def with_available(
    monkeypatch: pytest.MonkeyPatch, available: int, context: int = 4096
) -> MemoryPlan:
    monkeypatch.setattr("kvq_runtime.memory.available_bytes", lambda _: available)
    return plan_memory(make_tiny_llama(), make_sidecar(2), context=context)


@pytest.mark.parametrize("context", [300, 4096, 100_000])
def test_the_largest_context_that_fits(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    available = 20 * MIB
    largest = with_available(monkeypatch, available, context).largest_context()
    assert largest % PAGE_TOKENS == 0
    assert with_available(monkeypatch, available, largest).fits
    assert not with_available(monkeypatch, available, largest + PAGE_TOKENS).fits


def test_nothing_fits_into_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = with_available(monkeypatch, 0)
    assert not plan.fits
    assert plan.largest_context() == 0
    assert with_available(monkeypatch, plan.total).fits


def most_alive(model: LlamaForCausalLM, sidecar: Sidecar, *, context: int, chunk: int) -> int:
    """Most bytes of tensors in a chunk at the end of a context, beyond those before it."""
    ids = torch.randint(3, 300, (1, context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), attach(model, sidecar):
        cache = PackedCache(model, sidecar, capacity=context)
        model(ids[:, : context - chunk], past_key_values=cache, logits_to_keep=1)
        codec = next(packed_layers(cache)).codec
        assert isinstance(codec, SidecarPageCodec)
        assert codec.workspace is not None
        before = codec.workspace.nbytes
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(ids[:, context - chunk :], past_key_values=cache, logits_to_keep=1)
    # What events() makes of these has no sizes.
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    alive = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        alive += change.nbytes()
        most = max(most, alive)
    return before + most


@pytest.mark.parametrize("chunk", [64, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_what_comes_and_goes(chunk: int, dtype: torch.dtype) -> None:
    model = make_tiny_llama(
        hidden_size=256, num_attention_heads=16, num_key_value_heads=4, head_dim=64
    ).to(dtype)
    sidecar = make_sidecar(3, model=model)
    plan = plan_memory(model, sidecar, context=3000, prefill_chunk=chunk)
    found = most_alive(model, sidecar, context=3000, chunk=chunk)
    # Tensors that are small beside these are not counted one by one.
    assert found <= plan.scratch <= 1.25 * found


@pytest.mark.parametrize("name", ["context", "batch_size", "prefill_chunk"])
@pytest.mark.parametrize("number", [0, -1, LARGEST_CONTEXT + 1])
def test_numbers_that_make_no_sense(name: str, number: int) -> None:
    with pytest.raises(ConfigError, match=name):
        plan_memory(make_tiny_llama(), make_sidecar(), **{"context": 256, name: number})


def test_bad_input(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        plan_memory(tiny_model_dir, make_sidecar(), context=256, dtype="int8")
    with pytest.raises(SidecarError):
        plan_memory(tiny_model_dir, tmp_path / "missing", context=256)
