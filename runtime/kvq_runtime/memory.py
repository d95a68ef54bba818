"""What a model, its packed cache and a step of work need in memory, before any of it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvq_formats.config import LARGEST_CONTEXT, PAGE_TOKENS
from kvq_formats.errors import ConfigError
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.sidecar import Sidecar
from kvq_runtime.available_memory import available_bytes
from kvq_runtime.cache import BF16_BYTES, cache_bytes, cache_layers
from kvq_runtime.generate import PREFILL_CHUNK
from kvq_runtime.implementation import choose_implementation
from kvq_runtime.models import first_device, target_device
from kvq_runtime.offload import execution_devices
from kvq_runtime.resolve import ResolvedModel, resolve_model
from kvq_runtime.scratch import scratch_bytes
from kvq_runtime.sidecars import open_sidecar
from kvq_runtime.supported_models import quantized_layers, text_config
from kvq_runtime.weight_bytes import tensor_bytes, weight_bytes, weights_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run, and what there is to hold them.

    Fields:
        context: tokens a row that the cache has room for.
        batch_size: rows.
        prefill_chunk: prompt tokens a forward.
        device: where the model and its cache are, or how they are spread.
        weights: parameters and buffers; each tied one once.
        weights_loaded: whether they are in memory already, and ``available`` is what they left.
        cache: what a PackedCache of this context allocates.
        scratch: activations and attention of one chunk, which come and go.
        bf16_cache: what a 16-bit cache of the same tokens would take.
        available: memory that is free on the device.
    """

    context: int
    batch_size: int
    prefill_chunk: int
    device: str
    weights: int
    weights_loaded: bool
    cache: int
    scratch: int
    bf16_cache: int
    available: int
    _needed_at: Callable[[int], int] = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """Weights, cache and scratch."""
        return self.weights + self.cache + self.scratch

    @property
    def fits(self) -> bool:
        """Whether what is not in memory yet can be there."""
        return self._fits(self.cache + self.scratch)

    def largest_context(self) -> int:
        """The most tokens a row that would fit, other things equal, in whole pages.

        0 if not even one page does.
        """
        # Bracketed first: counting the bytes of a context takes time in proportion to it.
        low, high = 0, max(1, self.context // PAGE_TOKENS)
        while high < LARGEST_CONTEXT // PAGE_TOKENS and self._has_room(high):
            low, high = high, 2 * high
        high = min(high, LARGEST_CONTEXT // PAGE_TOKENS + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._has_room(middle) else (low, middle)
        return low * PAGE_TOKENS

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes throughout."""
        return {
            "context": self.context,
            "batch_size": self.batch_size,
            "prefill_chunk": self.prefill_chunk,
            "device": self.device,
            "weights_bytes": self.weights,
            "weights_loaded": self.weights_loaded,
            "cache_bytes": self.cache,
            "scratch_bytes": self.scratch,
            "total_bytes": self.total,
            "bf16_cache_bytes": self.bf16_cache,
            "available_bytes": self.available,
            "fits": self.fits,
        }

    def _has_room(self, pages: int) -> bool:
        return self._fits(self._needed_at(pages * PAGE_TOKENS))

    def _fits(self, needed: int) -> bool:
        weights = 0 if self.weights_loaded else self.weights
        return weights + needed <= self.available


def plan_memory(
    model: PreTrainedModel | ResolvedModel | str | os.PathLike[str],
    sidecar: Sidecar | str | os.PathLike[str],
    *,
    context: int,
    batch_size: int = 1,
    prefill_chunk: int = PREFILL_CHUNK,
    dtype: str = "auto",
    device: str | None = None,
    impl: str | None = None,
    load_in: str | None = None,
) -> MemoryPlan:
    """Count what a run would need, allocating nothing and loading no weights.

    Args:
        model: a loaded model, one that ``resolve_model`` found, a folder or a Hub id.
        sidecar: an object, a path or a Hub id.
        context: tokens a row.
        batch_size: rows.
        prefill_chunk: prompt tokens a forward.
        dtype: of the weights: ``auto`` (as stored), ``bfloat16``, ``float16`` or ``float32``; a
            loaded model has its own.
        device: where the model will go, as for ``--device-map``; a loaded model has its own.
        impl: of attention over packed pages, as for ``attach``.
        load_in: of the weights, as for ``load_model``.

    Raises:
        ConfigError: a number or a name that makes no sense.
        ModelError, SidecarError: what cannot be found or read.
        KVQError: ``impl`` cannot run there.
    """
    for name, number in {
        "context": context,
        "batch_size": batch_size,
        "prefill_chunk": prefill_chunk,
    }.items():
        if not 1 <= number <= LARGEST_CONTEXT:
            raise ConfigError(
                f"{name} is {number:,}, expected 1 to {LARGEST_CONTEXT:,}.", hint=f"{name}=512"
            )
    if not isinstance(sidecar, Sidecar):
        sidecar = open_sidecar(sidecar)
    if isinstance(model, PreTrainedModel):
        weights, loaded = tensor_bytes(model), True
        config, kind, place = model.config, model.dtype, _place(model)
    else:
        if not isinstance(model, ResolvedModel):
            model = resolve_model(model)
        place, config, loaded = target_device(device), model.config, False
        kind = weights_dtype(model, dtype)
        weights = weight_bytes(model, dtype=kind, load_in=load_in)

    attends_on = first_device(place)
    implementation = choose_implementation(attends_on, impl).name

    def cache_at(tokens: int) -> int:
        return cache_bytes(config, sidecar, capacity=tokens, batch_size=batch_size, dtype=kind)

    def scratch_at(tokens: int) -> int:
        return scratch_bytes(
            text_config(config),
            sidecar.config,
            context=tokens,
            batch_size=batch_size,
            chunk=prefill_chunk,
            dtype=kind,
            device=attends_on,
            impl=implementation,
        )

    return MemoryPlan(
        context=context,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        device=place,
        weights=weights,
        weights_loaded=loaded,
        cache=cache_at(context),
        scratch=scratch_at(context),
        bf16_cache=_bf16_bytes(config, context=context, batch_size=batch_size),
        available=available_bytes(place),
        _needed_at=lambda tokens: cache_at(tokens) + scratch_at(tokens),
    )


def _place(model: PreTrainedModel) -> str:
    devices = execution_devices(model)
    return str(devices.pop()) if len(devices) == 1 else "auto"


def _bf16_bytes(config: PreTrainedConfig, *, context: int, batch_size: int) -> int:
    """Bytes of the stock cache at 16 bits: windows as they are, everything else to the end."""
    shape = Fingerprint.from_config(text_config(config))
    whole = set(quantized_layers(config))
    tokens = 0
    for layer_idx, layer in enumerate(cache_layers(config, {})):
        if layer_idx in whole:
            tokens += context
        elif (window := layer.get_max_length()) > 0:
            tokens += min(context, window - 1)
    return 2 * BF16_BYTES * batch_size * tokens * shape.num_kv_heads * shape.head_dim
