"""What calibration keeps of one layer between batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch

from kvq_calibration.moments import GradientMoments
from kvq_calibration.points import NormalisedPoints
from kvq_calibration.refit import CODEBOOK_TOKENS, MEAN_TOKENS
from kvq_calibration.token_sample import TokenSample


@dataclass
class LayerPoints:
    """Keys and values of one layer; its size does not grow with the text.

    Fields:
        key_sample, value_sample: some tokens as they are; empty without sensitivity.
        key, value: histograms in normalised units.
        key_moments, value_moments: of the gradients; empty without sensitivity.
        far_key_moments, far_value_moments: of those through queries of later pages.
    """

    key_sample: TokenSample
    value_sample: TokenSample
    key: NormalisedPoints = field(default_factory=NormalisedPoints)
    value: NormalisedPoints = field(default_factory=NormalisedPoints)
    key_moments: GradientMoments = field(default_factory=GradientMoments)
    value_moments: GradientMoments = field(default_factory=GradientMoments)
    far_key_moments: GradientMoments = field(default_factory=GradientMoments)
    far_value_moments: GradientMoments = field(default_factory=GradientMoments)

    @classmethod
    def of(cls, tokens: int, dtype: torch.dtype) -> Self:
        """Nothing yet, of a text of so many tokens in a model of this type."""
        keys, values = (
            TokenSample.of(tokens, at_most=most, dtype=dtype)
            for most in (CODEBOOK_TOKENS, MEAN_TOKENS)
        )
        return cls(keys, values)
