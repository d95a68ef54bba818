"""Whether a decode step of an attached model can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvq_formats.errors import KVQError
from kvq_runtime.cache import PackedCache, adopt, cache_layers
from kvq_runtime.layer import PackedLayer
from kvq_runtime.offload import is_offloaded
from kvq_runtime.rope import PREFIX, rotary_modules
from kvq_runtime.runtime_rule import attached_tap

EAGER = "--no-cuda-graph (in Python: decode without kvq.CapturedDecode)"
CHANGING_ROPE = ("dynamic", "longrope")
"""Rotations whose frequencies a forward may change, which the host decides on."""


def check_capturable(model: PreTrainedModel, cache: Cache) -> torch.device:
    """The device of a step that can be captured; else a KVQError says why not, and what mends it.

    Everything that persists has to keep its address, and nothing may be decided by the host.
    """
    tap = attached_tap(model)
    if tap is None and str(model.config._attn_implementation).startswith(PREFIX):
        raise KVQError(
            "the model is attached with a rule that has no packed cache, which a captured step "
            "reads.",
            hint="kvq.attach(model, sidecar, rule='runtime'), or rule='exact-prefill'",
        )
    if tap is None:
        raise KVQError(
            "a decode step is captured of an attached model, and this one is not attached.",
            hint="open `with kvq.attach(model, sidecar):` first",
        )
    if tap.impl != "triton":
        raise KVQError(
            f"attention runs on {tap.impl!r} here; a step is captured on Triton kernels only.",
            hint="--impl triton (in Python: kvq.attach(..., impl='triton'))",
        )
    if not isinstance(cache, PackedCache):
        raise KVQError(
            f"a {type(cache).__name__} was passed; a captured step reads a packed cache.",
            hint="kvq.PackedCache(model, sidecar, capacity=N)",
        )
    expected = len(cache_layers(model.config, tap.codecs))
    if len(cache.layers) != expected:
        raise KVQError(
            f"the cache belongs to another model: it has {len(cache.layers)} layers, expected "
            f"{expected}.",
            hint="kvq.PackedCache(model, sidecar, capacity=N), of this model",
        )
    for layer in cache.layers:
        if not isinstance(layer, PackedLayer):
            raise KVQError(
                "the model has layers with a sliding window, which keep transformers' dynamic "
                "cache: its tensors move as it grows, and a CUDA graph knows them by address.",
                hint=EAGER,
            )
        if layer.capacity is None:
            raise KVQError(
                "the cache grows, so that its tensors move; a CUDA graph knows them by address.",
                hint="kvq.PackedCache(model, sidecar, capacity=N)",
            )
    if (name := next(_changing_ropes(model.config), None)) is not None:
        raise KVQError(
            f"the model's rotation is {name!r}: its frequencies change with the length of the "
            "text, which a captured step would not notice.",
            hint=EAGER,
        )
    if any(buffer.is_inference() for rope in rotary_modules(model) for buffer in rope.buffers()):
        raise KVQError(
            "the model was loaded in inference mode, so that a change of its rotary frequencies "
            "cannot be seen without waiting for the device.",
            hint="load the model outside of torch.inference_mode()",
        )
    if is_offloaded(model):
        raise KVQError(
            "weights of the model are kept on the host or the disk and brought to the GPU for each "
            "forward; a CUDA graph knows them by address.",
            hint=f"--device-map cuda, or {EAGER}",
        )
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    devices |= {layer.device for layer in cache.layers}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise KVQError(
            f"the model and its cache lie on several devices ({found}); a CUDA graph belongs to "
            "one GPU.",
            hint=f"--device-map cuda, or {EAGER}",
        )
    # Another sidecar's cache is refused here, as every forward would.
    adopt(cache, model, tap.codecs)
    return devices.pop()


def check_cuda(device: torch.device) -> None:
    """Raise KVQError where there is no GPU to capture on."""
    if device.type != "cuda":
        raise KVQError(
            f"CUDA graphs need a CUDA or ROCm GPU; the model is on {device}.",
            hint='--device-map cuda (in Python: model.to("cuda") before kvq.attach) where there is '
            f"a GPU, or {EAGER}",
        )


def check_token_ids(token_ids: Tensor, rows: int) -> None:
    """Raise KVQError for what is no integer tensor ``[rows]`` or ``[rows, 1]``."""
    hint = f"an integer tensor of shape [{rows}] or [{rows}, 1]"
    if not isinstance(token_ids, Tensor):
        raise KVQError(
            f"token_ids is a {type(token_ids).__name__}, expected a tensor of integers.", hint=hint
        )
    kind = token_ids.dtype
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise KVQError(f"token_ids is of {kind}, expected integers.", hint=hint)
    if tuple(token_ids.shape) not in ((rows,), (rows, 1)):
        raise KVQError(
            f"token_ids is {list(token_ids.shape)}; the cache holds {rows} rows, and a step takes "
            "one token of each.",
            hint=hint,
        )


def _changing_ropes(config: PreTrainedConfig) -> Iterator[str]:
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # One set, or one for each type of layer.
    for part in (found, *(part for part in found.values() if isinstance(part, dict))):
        name = part.get("rope_type")
        if isinstance(name, str) and any(kind in name for kind in CHANGING_ROPE):
            yield name
