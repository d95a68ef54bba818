"""A cache that must wreck whatever reads it."""

from __future__ import annotations

from dataclasses import replace

from kvq_formats.sidecar import Sidecar


def with_garbage_codebooks(sidecar: Sidecar) -> Sidecar:
    """Codes decode to the number on the other side of the centre."""
    layers = {}
    for index, layer in sidecar.layers.items():
        key, value = (
            replace(part, codebook=replace(part.codebook, levels=part.codebook.levels.flip(0)))
            for part in (layer.key, layer.value)
        )
        layers[index] = replace(layer, key=key, value=value)
    return replace(sidecar, layers=layers)
