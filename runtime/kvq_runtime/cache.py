"""The packed cache of a whole model, as transformers' ``generate`` knows caches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
)

from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError, KVQError
from kvq_formats.sidecar import Sidecar
from kvq_runtime.decode_step import StepForward
from kvq_runtime.layer import PackedLayer
from kvq_runtime.offload import execution_device
from kvq_runtime.page_codec import (
    PageCodec,
    SidecarPageCodec,
    page_codecs,
    unrotated_codecs,
)
from kvq_runtime.stock_layers import types_and_options

BF16_BYTES = 2


class PackedCache(Cache):
    """Packed layers where the sidecar quantizes, stock layers (sliding windows) everywhere else.

    Belongs to one model and sidecar, and is used inside ``kvq.attach``, which makes one by itself
    where none is passed. Several turns, ``crop``, beams and the other operations of caches work;
    padding takes no room.

    Fields:
        step: the forward of the captured step that runs now; None in every other forward.
    """

    step: StepForward | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        sidecar: Sidecar | str | os.PathLike[str],
        *,
        capacity: int | None = None,
        batch_size: int = 1,
    ) -> None:
        """Allocate for ``capacity`` tokens of ``batch_size`` rows, or let it grow.

        Args:
            model: the model that will use it; raises FingerprintMismatchError for another one than
                the sidecar's, UnsupportedModelError where its rotation is not understood.
            sidecar: an object or a path.
            capacity: slots a row, padding included. Pages are allocated at once and more tokens are
                refused (CacheFullError). None grows in slabs.
            batch_size: rows that are allocated for with a capacity.
        """
        from kvq_runtime.attach import fitting_sidecar

        if capacity is not None and capacity < 1:
            raise ConfigError(
                f"capacity is {capacity}, expected at least 1 token.", hint="capacity=4096"
            )
        if batch_size < 1:
            raise ConfigError(
                f"batch_size is {batch_size}, expected at least 1 row.", hint="batch_size=1"
            )
        codecs = page_codecs(model, fitting_sidecar(model, sidecar))
        super().__init__(layers=cache_layers(model.config, codecs, capacity=capacity))
        if capacity is not None:
            for layer in packed_layers(self):
                device, dtype = layer_placement(model, self.layers.index(layer))
                layer.allocate(batch_size, dtype=dtype, device=device)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` slots of every row; a count > 0 is what to keep.

        Where layers differ, because a forward failed between them, a count to keep makes them
        equal. Layers with a window have transformers' own limits, and a recurrent state has none of
        its earlier tokens to go back to.
        """
        # Assisted generation of transformers 5.17 counts in tensors.
        tokens_to_remove = int(tokens_to_remove)
        slots = self.get_seq_length()
        removed = slots - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        for layer_idx, layer in enumerate(self.layers):
            if removed > 0 and not isinstance(layer, CacheLayerMixin):
                raise KVQError(
                    f"layer {layer_idx} has a recurrent state, which cannot give tokens back.",
                    hint="cache.reset(), or a new cache",
                )
        for layer in self.layers:
            count = tokens_to_remove
            if count > 0:
                # Stock layers take negative counts only.
                count = min(0, count - layer.get_seq_length())
            if count:
                layer.crop(count)

    @property
    def tokens_held(self) -> list[int]:
        """Attended tokens of each row that every layer holds."""
        return [
            min(row.tokens for row in rows)
            for rows in zip(*(layer.rows for layer in packed_layers(self)), strict=True)
        ]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of every tensor that the cache has allocated, stock layers included."""
        return sum(layer.allocated_bytes for layer in packed_layers(self)) + self._stock_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes without pages that are allocated and not in use."""
        return sum(layer.held_bytes for layer in packed_layers(self)) + self._stock_bytes

    @property
    def bf16_bytes(self) -> int:
        """Bytes that a 16-bit cache of the tokens held would take."""
        packed = sum(
            2 * BF16_BYTES * layer.codec.num_kv_heads * layer.codec.head_dim * row.tokens
            for layer in packed_layers(self)
            for row in layer.rows
        )
        return packed + self._stock_bytes * BF16_BYTES // max(self._stock_itemsize, 1)

    @property
    def _stock_tensors(self) -> list[torch.Tensor]:
        return [
            tensor
            for layer in self.layers
            if not isinstance(layer, PackedLayer)
            for tensor in _tensors_of(layer)
        ]

    @property
    def _stock_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._stock_tensors)

    @property
    def _stock_itemsize(self) -> int:
        return max((tensor.element_size() for tensor in self._stock_tensors), default=0)


def _tensors_of(layer: Any) -> Iterator[torch.Tensor]:
    """What a stock layer holds: keys and values, or the states of a recurrent one."""
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        for tensor in held.values() if isinstance(held, dict) else (held,):
            if isinstance(tensor, torch.Tensor):
                yield tensor


def packed_layers(cache: Cache) -> Iterator[PackedLayer]:
    """The packed layers of a cache, in order."""
    return (layer for layer in cache.layers if isinstance(layer, PackedLayer))


def cache_layers(
    config: PreTrainedConfig, codecs: Mapping[int, PageCodec], *, capacity: int | None = None
) -> list[Any]:
    """One layer a model layer: packed where there is a codec, the stock dynamic one elsewhere."""
    types, options = types_and_options(config)
    return [
        PackedLayer(codecs[layer_idx], capacity=capacity)
        if layer_idx in codecs
        else DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)
        for layer_idx, (kind, given) in enumerate(zip(types, options, strict=True))
    ]


def layer_placement(model: PreTrainedModel, layer_idx: int) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the keys of a layer."""
    from kvq_runtime.rope import attention_modules

    attention = attention_modules(model)[layer_idx]
    weight = next(attention.parameters())
    # Weights of one byte are scaled numbers; what they compute has the model's dtype.
    is_float = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    dtype = weight.dtype if is_float else model.dtype
    return execution_device(model, attention), dtype


def adopt(cache: Cache | None, model: PreTrainedModel, codecs: Mapping[int, PageCodec]) -> Cache:
    """The packed cache that a forward uses in place of ``cache``.

    None makes a new one. An empty DynamicCache *becomes* a packed one, so that whoever holds it, as
    ``generate`` does, sees the tokens. A packed cache is taken as it is.

    Raises KVQError for a cache that holds unquantized tokens, is of another kind, or was packed
    with another sidecar.
    """
    if cache is None:
        cache = DynamicCache()
    if type(cache) is PackedCache:
        _check_codecs(cache, codecs)
        check_whole(cache)
        return cache
    if type(cache) is not DynamicCache or cache.offloading:
        offloading = " with offloading" if getattr(cache, "offloading", False) else ""
        raise KVQError(
            f"a {type(cache).__name__}{offloading} was passed; an attached model runs on a packed "
            "cache.",
            hint="leave past_key_values and cache_implementation out",
        )
    if cache.get_seq_length() > 0:
        raise KVQError(
            f"past_key_values holds {cache.get_seq_length()} tokens that are not quantized; an "
            "attached model runs on a packed cache.",
            hint="start with a new cache inside `with kvq.attach(...)`",
        )
    given = cache.layers
    cache.__class__ = PackedCache
    cache.layers = cache_layers(model.config, codecs)
    for layer_idx, layer in enumerate(given[: len(cache.layers)]):
        # Stock layers stay: what generate has set on them counts.
        if type(layer) is type(cache.layers[layer_idx]):
            cache.layers[layer_idx] = layer
    cache.layer_class_to_replicate = None
    return cache


def _check_codecs(cache: Cache, codecs: Mapping[int, PageCodec]) -> None:
    for layer_idx, layer in enumerate(cache.layers):
        wanted = codecs.get(layer_idx)
        given = layer.codec if isinstance(layer, PackedLayer) else None
        if wanted is not None and layer.known_codec is wanted:
            continue
        if (given is None) != (wanted is None) or not _same(given, wanted):
            raise KVQError(
                "the packed cache that was passed belongs to another sidecar or model.",
                hint="start with a new cache inside `with kvq.attach(...)`",
            )
        if wanted is not None:
            layer.known_codec = wanted


def _same(given: PageCodec | None, wanted: PageCodec | None) -> bool:
    if given is wanted:
        return True
    if not isinstance(given, SidecarPageCodec) or not isinstance(wanted, SidecarPageCodec):
        return False
    return (
        given.config == wanted.config
        and given.digest == wanted.digest
        and torch.equal(given.rotary.order, wanted.rotary.order)
        and given.rotary.angles().same_as(wanted.rotary.angles())
    )


def check_whole(cache: Cache) -> None:
    """Refuse a cache that a failed forward left in the middle."""
    # Recurrent layers do not count tokens.
    slots = {layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin)}
    if any(layer.torn for layer in packed_layers(cache)):
        raise KVQError(
            "a forward failed while this cache was written to; what it holds is not whole.",
            hint="cache.reset(), or a new cache",
        )
    if len(slots) > 1:
        raise KVQError(
            f"a forward failed between the layers of this cache: some hold {min(slots):,} tokens "
            f"a row, some {max(slots):,}.",
            hint=f"cache.crop({min(slots)}), or a new cache",
        )


def cache_bytes(
    config: PreTrainedConfig,
    sidecar: Sidecar,
    *,
    capacity: int,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that a PackedCache of ``capacity`` tokens allocates: counted, and nothing allocated.

    Stock sliding-window layers count what they hold when the cache is full; recurrent states, which
    do not depend on the capacity, are not counted. ``dtype`` is the model's.
    """
    codecs = unrotated_codecs(sidecar)
    total = 0
    fingerprint = sidecar.base_model.fingerprint
    packed: dict[KVQConfig, int] = {}
    for layer_idx, layer in enumerate(cache_layers(config, codecs, capacity=capacity)):
        if isinstance(layer, PackedLayer):
            widths = codecs[layer_idx].config
            if widths not in packed:
                layer.allocate(batch_size, dtype=dtype, device="meta")
                packed[widths] = layer.allocated_bytes
            # Equal widths have one shape, and lists of millions of pages take their time.
            total += packed[widths]
        elif (window := layer.get_max_length()) > 0:
            tokens = min(capacity, window - 1)
            heads = fingerprint.num_kv_heads * fingerprint.head_dim
            total += 2 * batch_size * tokens * heads * dtype.itemsize
    return total
