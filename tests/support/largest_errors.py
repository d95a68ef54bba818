"""The largest errors that the codes of a sidecar allow, with random signs: what bounds a KL.

To second order a KL is a quadratic form in the errors of keys and values, and its mean over random
signs is a sum of squares with weights that do not depend on the errors. A code's error is nowhere
larger than that of the worst number which gets that code, so errors of that size everywhere, with
random signs, give at least as large a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_formats.codebook import Codebook
from kvq_formats.outliers import value_outliers_per_side
from kvq_formats.pages import value_thresholds
from kvq_formats.sidecar import Sidecar
from kvq_runtime.sidecar_codec import SidecarCodec


def largest_error(codebook: Codebook) -> float:
    """Of any number in [-1, 1], in units of the normalised range."""
    edges = torch.cat([torch.tensor([-1.0]), codebook.midpoints, torch.tensor([1.0])])
    below = (codebook.decode_entries - edges[:-1]).abs().max()
    above = (codebook.decode_entries - edges[1:]).abs().max()
    return float(torch.maximum(below, above))


class LargestErrors(SidecarCodec):
    """Every number is off by the most that its layer's codes allow."""

    def __init__(self, sidecar: Sidecar) -> None:
        super().__init__(sidecar)
        self.generator = torch.Generator().manual_seed(0)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        key = self.sidecar.layers[layer_idx].key
        return keys + self.signs(keys) * largest_error(key.codebook) * key.half_range[:, None]

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        value, config = self.sidecar.layers[layer_idx].value, self.sidecar.config
        H, T, D = values.shape
        vectors = values.transpose(0, 1).reshape(T, H * D)
        per_side = value_outliers_per_side(config, H, D)
        half, _, _ = value_thresholds(vectors, outliers_per_side=per_side)
        return values + self.signs(values) * largest_error(value.codebook) * half.float()

    def signs(self, x: Tensor) -> Tensor:
        return torch.randint(0, 2, x.shape, generator=self.generator) * 2.0 - 1.0
