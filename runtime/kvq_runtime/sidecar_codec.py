"""A sidecar as a codec: what its packed pages make of keys and values."""

from __future__ import annotations

from torch import Tensor

from kvq_formats import pages
from kvq_formats.sidecar import Sidecar


class SidecarCodec:
    """A sidecar as a ``CacheCodec``: every number goes through packed pages and back."""

    rotated_keys = False

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.layers = frozenset(sidecar.layers)
        self.sink_tokens = sidecar.config.sink_tokens
        self.recent_tokens = sidecar.config.recent_tokens

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """Keys f32 ``[H, T, D]`` before RoPE, through their pages."""
        parameters = self.sidecar.layers[layer_idx].key
        packed = pages.encode_keys(keys, parameters, self.sidecar.config.for_layer(layer_idx))
        return pages.decode_keys(packed, parameters, tokens=keys.shape[1])

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """Values f32 ``[H, T, D]``, through their pages."""
        parameters = self.sidecar.layers[layer_idx].value
        packed = pages.encode_values(values, parameters, self.sidecar.config.for_layer(layer_idx))
        return pages.decode_values(packed, parameters, tokens=values.shape[1])
