"""Models whose layers lie on several pretended devices, and what a packed layer holds there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvq_runtime.layer import PackedLayer
from labelled_devices import NAME

ELSEWHERE = frozenset(
    {"forward", "known_codec", "parameters", "_rotary", "workspace", "_workspace"}
)
"""What a layer knows without holding it: the forward that runs, which belongs to all layers; the
sidecar; how the model rotates; and blocks to decode into, one of each device for all layers."""


def spread(model: PreTrainedModel, devices: int) -> PreTrainedModel:
    """A copy with layer i on ``cuda:i``, modulo ``devices``, placed and served by accelerate.

    As ``device_map="auto"`` has it, what comes behind the layers in the model's order lies with the
    last one: the rotary module, too.
    """
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    names = {module: name for name, module in model.named_modules()}
    where = {names[layer]: f"{NAME}:{i % devices}" for i, layer in enumerate(layers)}
    first, last = f"{NAME}:0", list(where.values())[-1]
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    for name, module in model.named_modules():
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in where)
        if not inside and not list(module.children()):
            is_output = module is output and output.weight is not inputs.weight
            is_behind = name.endswith(("norm", "rotary_emb"))
            where[name] = last if is_output or is_behind else first
    return dispatch_model(copy.deepcopy(model), where, main_device=first)


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where the weights of each layer lie."""
    found = []
    for layer in model.base_model.layers:
        devices = {weight.device for weight in layer.parameters()}
        assert len(devices) == 1
        found += devices
    return found


def held_tensors(layer: PackedLayer) -> dict[str, Tensor]:
    """Every tensor that a packed layer holds, by the path that leads there."""
    return dict(_tensors(layer, "", {id(layer)}))


def _tensors(holder: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(holder, Tensor):
        yield path, holder
        return
    if isinstance(holder, dict):
        members = {str(name): value for name, value in holder.items()}
    elif isinstance(holder, list | tuple):
        members = {str(place): value for place, value in enumerate(holder)}
    elif is_dataclass(holder):
        members = {field.name: getattr(holder, field.name) for field in fields(holder)}
    else:
        members = dict(getattr(holder, "__dict__", {}))
    for name, value in members.items():
        if name not in ELSEWHERE and id(value) not in seen:
            seen.add(id(value))
            yield from _tensors(value, f"{path}.{name}", seen)
