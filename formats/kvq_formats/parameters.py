"""What calibration learned of a layer, and all that decoding its cache needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

# Reading a sidecar's header needs the statistics below and must not cost an import of torch.
if TYPE_CHECKING:
    from torch import Tensor

    from kvq_formats.codebook import Codebook
    from kvq_formats.feedback import Feedback


@dataclass(frozen=True)
class KeyParameters:
    """Keys, per channel, before RoPE (KVQuant, sections 3.1 and 3.2).

    Fields:
        center, half_range: f32 ``[H, D]``, in the units of the keys; half_range > 0.
        codebook: one for the layer.
        outlier_step: step of a stored residual, in units of the channel's half_range.
        feedback: how rounding errors travel between channels; None: each is rounded by itself.
    """

    center: Tensor
    half_range: Tensor
    codebook: Codebook
    outlier_step: float
    feedback: Feedback | None = None


@dataclass(frozen=True)
class ValueParameters:
    """Values, per token: centre and half-range are found online.

    Fields:
        codebook: one for the layer.
        outlier_step: step of a stored residual, in units of the token's half_range.
        feedback: as for keys.
    """

    codebook: Codebook
    outlier_step: float
    feedback: Feedback | None = None


@dataclass(frozen=True)
class LayerParameters:
    """Keys and values of one layer."""

    key: KeyParameters
    value: ValueParameters


@dataclass(frozen=True)
class LayerStatistics:
    """What the codebooks cost on the calibration text.

    Fields:
        key_error, value_error: sensitivity-weighted mean squared error of the normalised inliers,
            over their weighted mean square (0 is exact, 1 as bad as decoding zeros).
        key_outlier_share, value_outlier_share: share of entries outside the thresholds.
    """

    key_error: float
    value_error: float
    key_outlier_share: float
    value_outlier_share: float
