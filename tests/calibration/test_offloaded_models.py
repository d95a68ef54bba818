"""Calibrating a model whose weights are on the host or the disk gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.pipeline import calibrate
from kvq_formats.config import KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from tiny_models import make_tiny_family, make_tiny_llama

WINDOWS = torch.randint(3, 190, (3, 64), generator=torch.Generator().manual_seed(5))


def sidecar_of(model: PreTrainedModel, sensitivity: str) -> Sidecar:
    shape = Fingerprint.from_config(model.config.to_dict())
    return calibrate(
        model,
        WINDOWS,
        KVQConfig.create(key_bits=3, value_bits=3, sensitivity=sensitivity),
        base_model=BaseModelRecord(id="test/tiny", revision=None, fingerprint=shape),
        calibration=CalibrationRecord(
            dataset="test", revision=None, num_samples=3, seq_len=64, seed=0, token_sha256="0" * 64
        ),
        batch_size=2,
    )


def make(name: str) -> PreTrainedModel:
    if name == "mixtral":
        return make_tiny_family("mixtral", num_local_experts=4, num_experts_per_tok=2)
    return make_tiny_llama(tie_word_embeddings=name == "tied llama")


def offload(model: PreTrainedModel, how: str, folder: Path) -> None:
    if how == "host":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        disk_offload(model, str(folder), execution_device="cpu")
    else:
        where = {"model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.layers.1": "disk"}
        where |= {"model.embed_tokens": "disk", "model.norm": "disk", "lm_head": "disk"}
        dispatch_model(model, where, offload_dir=str(folder))


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The numbers of all weights, wherever they are."""
    found = {}
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            for key in dict(module.named_parameters(recurse=False)):
                held = getattr(part, "weights_map", None)
                where = module.get_parameter(key) if held is None else held[key]
                found[f"{name}.{key}"] = where.detach().clone()
    return found


@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
@pytest.mark.parametrize("how", ["host", "disk", "both"])
@pytest.mark.parametrize("name", ["llama", "tied llama", "mixtral"])
def test_the_same_bytes(name: str, how: str, sensitivity: str, tmp_path: Path) -> None:
    expected = sidecar_of(make(name), sensitivity)._files()
    model = make(name)
    offload(model, how, tmp_path)
    assert sidecar_of(model, sensitivity)._files() == expected


@pytest.mark.parametrize("how", ["host", "disk", "both"])
def test_the_model_is_as_it_was(how: str, tmp_path: Path) -> None:
    """Offloaded weights are new objects after each forward; what was set on them must stay."""
    model = make_tiny_llama()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    offload(model, how, tmp_path)
    before = weights_of(model)
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    places = {name: weight.device for name, weight in model.named_parameters()}
    assert set(wanted.values()) == {True, False}
    sidecar_of(model, "fisher")
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == wanted
    assert {name: weight.device for name, weight in model.named_parameters()} == places
    assert all(weight.grad is None for weight in model.parameters())
    assert all(module.training for module in model.modules())
    after = weights_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
