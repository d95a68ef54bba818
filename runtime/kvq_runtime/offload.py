"""Where a model computes, also where accelerate keeps its weights on the host or the disk.

Offloaded weights are on the ``meta`` device between forwards: accelerate's hook of their module
brings them to an execution device as the module runs, and sends them away again. That device, not
the weights', is where activations are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"
"""Where accelerate keeps the hook, or the sequence of hooks, of a module."""


def execution_device(model: nn.Module, part: nn.Module | None = None) -> torch.device:
    """Where ``part`` of ``model``, or its first weight, is while a forward runs.

    ``meta`` for a model that has no weights at all yet.
    """
    weight = next((part or model).parameters())
    return _runs_on(model, weight)


def execution_devices(model: nn.Module) -> set[torch.device]:
    """Where the weights and buffers are while a forward runs."""
    tensors = (*model.parameters(), *model.buffers())
    found = {tensor.device for tensor in tensors if not tensor.is_meta}
    return found | {device for device, _ in _offloading(model)} or {torch.device("meta")}


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights are brought to their device for a forward, and sent away after it."""
    return next(_offloading(model), None) is not None


def input_device(model: nn.Module) -> torch.device:
    """Where token ids belong."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return execution_device(model, embeddings)


def _runs_on(model: nn.Module, weight: Tensor) -> torch.device:
    if not weight.is_meta:
        return weight.device
    holders = (device for device, held in _offloading(model) if any(weight is x for x in held))
    return next(holders, weight.device)


def _offloading(model: nn.Module) -> Iterator[tuple[torch.device, list[Tensor]]]:
    """Execution device and weights of each hook that offloads."""
    for module in model.modules():
        hook: Any = getattr(module, HOOK, None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None and getattr(part, "offload", False):
                # A hook of a block may hold the weights of all that is in it.
                yield torch.device(device), list(module.parameters(recurse=part.place_submodules))
