"""Offloaded models: nothing differs from the plain one but where the weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvq_formats.errors import KVQError
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, layer_placement, packed_layers
from kvq_runtime.capturable import check_capturable
from kvq_runtime.generate import generate_text
from kvq_runtime.memory import plan_memory
from kvq_runtime.offload import execution_device, execution_devices, input_device, is_offloaded
from kvq_runtime.sampling import Sampling
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

CPU, META = torch.device("cpu"), torch.device("meta")

Offload = Callable[[PreTrainedModel, Path], object]


def to_host(model: PreTrainedModel, _: Path) -> object:
    return cpu_offload(model, execution_device="cpu")


def with_buffers(model: PreTrainedModel, _: Path) -> object:
    return cpu_offload(model, execution_device="cpu", offload_buffers=True)


def to_disk(model: PreTrainedModel, folder: Path) -> object:
    return disk_offload(model, str(folder), execution_device="cpu")


def in_part(model: PreTrainedModel, folder: Path) -> object:
    """As ``device_map="auto"`` does where the host is too small."""
    where = {"model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.layers.1": "disk"}
    where |= {"model.embed_tokens": "disk", "model.norm": "disk", "lm_head": "disk"}
    return dispatch_model(model, where, offload_dir=str(folder))


OFFLOADS = [to_host, with_buffers, to_disk, in_part]


def ids(tokens: int = 300) -> Tensor:
    return torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_attached_logits_and_generated_text_are_those_of_the_plain_model(
    offload: Offload, tmp_path: Path
) -> None:
    plain, model = make_tiny_llama(), make_tiny_llama()
    offload(model, tmp_path)
    sidecar = make_sidecar(3, model=plain)
    found = []
    for one in (plain, model):
        with torch.no_grad(), attach(one, sidecar):
            cache = PackedCache(one, sidecar, capacity=400)
            assert {layer.device for layer in packed_layers(cache)} == {CPU}
            text = one.generate(ids(), past_key_values=cache, max_new_tokens=4, do_sample=False)
            found.append((one(ids()).logits, text))
        with torch.no_grad(), attach(one, sidecar, rule="evaluation"):
            found[-1] += (one(ids()).logits,)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_where_it_computes(offload: Offload, tmp_path: Path) -> None:
    model = make_tiny_llama()
    assert not is_offloaded(model)
    offload(model, tmp_path)
    assert is_offloaded(model)
    assert META in {weight.device for weight in model.parameters()}
    assert execution_device(model) == input_device(model) == CPU
    assert execution_devices(model) == {CPU}
    assert layer_placement(model, 1) == (CPU, torch.float32)
    plan = plan_memory(model, make_sidecar(3), context=400)
    assert plan.device == "cpu"
    assert plan.weights == plan_memory(make_tiny_llama(), make_sidecar(3), context=400).weights


def test_a_block_that_is_brought_as_a_whole() -> None:
    """``preload_module_classes``: one hook for the weights of all that is in a block."""
    model = make_tiny_llama()
    cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"])
    assert layer_placement(model, 1) == (CPU, torch.float32)


def test_a_model_without_weights_is_nowhere() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert execution_device(model) == META
    assert execution_devices(model) == {META}


def test_generate_text_runs_offloaded(tmp_path: Path) -> None:
    model = make_tiny_llama()
    to_disk(model, tmp_path)
    sidecar = make_sidecar(3)

    class Tokenizer:
        def decode(self, ids: Tensor, **_: object) -> str:
            return " ".join(str(int(i)) for i in ids)

    with attach(model, sidecar):
        cache = PackedCache(model, sidecar, capacity=400)
        made = generate_text(
            model, Tokenizer(), ids(), cache=cache, max_new_tokens=3,
            sampling=Sampling(temperature=1.0, seed=3), on_text=lambda _: None,
        )  # fmt: skip
    assert made.prompt_tokens == 300


def test_a_cuda_graph_of_offloaded_weights_is_refused() -> None:
    model, sidecar = make_tiny_llama(), make_sidecar(3)
    cpu_offload(model, execution_device="cpu")
    with attach(model, sidecar, impl="triton"):
        cache = PackedCache(model, sidecar, capacity=400)
        with pytest.raises(KVQError, match="brought to the GPU for each forward") as caught:
            check_capturable(model, cache)
    assert "--device-map cuda" in (caught.value.hint or "")
