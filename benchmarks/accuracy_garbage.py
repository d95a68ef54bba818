"""A cache that must wreck the model: what shows that an evaluation reads quantized numbers."""

from __future__ import annotations

from dataclasses import replace

from kvq_formats.parameters import LayerParameters
from kvq_formats.sidecar import Sidecar


def garbage(sidecar: Sidecar) -> Sidecar:
    """A sidecar whose codes decode to the number on the other side of the centre."""

    def mirrored(layer: LayerParameters) -> LayerParameters:
        key, value = (
            replace(
                part,
                codebook=replace(part.codebook, levels=part.codebook.levels.flip(0)),
                feedback=None,
            )
            for part in (layer.key, layer.value)
        )
        return LayerParameters(key=key, value=value)  # type: ignore[arg-type]

    return replace(sidecar, layers={i: mirrored(layer) for i, layer in sidecar.layers.items()})
