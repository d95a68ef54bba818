"""Second moments of the loss's gradient at a layer's keys, or at its values.

The diagonal is the sensitivity (KVQuant, section 3.3); the rest says which errors of two channels
add up and which cancel, and is what error feedback is made of (``kvq_formats.feedback``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_formats.feedback import Feedback, factorise

DAMPING = 0.03
"""Of 0.01 to 0.3, tried on development text with two small models, it lost least, by little."""

FAR_SHARE = 0.5
"""Weight of gradients through later pages' queries, which are few, beside all of them.

As a share of their sum. What it is worth: "feedback by all gradients alike" in docs/accuracy.md.
"""


class GradientMoments:
    """Sum over tokens of ``g g^T`` for each head, f64 ``[H, D, D]``, on the CPU."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Take in gradients f32 ``[T, H, D]``."""
        by_head = gradients.transpose(0, 1)
        # A batch in f32, where it was made; batches are many, and add up in f64.
        batch = (by_head.mT @ by_head).to("cpu", torch.float64)
        self.total = batch if self.total is None else self.total + batch

    def with_far(self, far: GradientMoments) -> Tensor:
        """These moments and ``FAR_SHARE`` of those of far gradients, f64 ``[H, D, D]``.

        Both are first made equal in the sum of their diagonals over all heads.
        """
        assert self.total is not None
        if far.total is None:
            return self.total
        all_of_it, far_part = (m.diagonal(dim1=1, dim2=2).sum() for m in (self.total, far.total))
        if far_part == 0:
            return self.total
        return self.total + (FAR_SHARE * all_of_it / far_part) * far.total


def at_normalised(moment: Tensor, half_range: Tensor) -> Tensor:
    """A moment f64 ``[H, D, D]`` at numbers that were divided by ``half_range`` f32 ``[H, D]``."""
    scale = half_range.double()
    return moment * scale[:, :, None] * scale[:, None, :]


def fit_feedback(moment: Tensor) -> Feedback:
    """Feedback between numbers at which the loss's gradient has this moment, f64 ``[H, D, D]``.

    A factor that all numbers of a head share, such as a token's range, makes no difference.
    """
    return Feedback.fit(moment, damping=DAMPING)


def target_weights(moment: Tensor) -> Tensor:
    """What a squared error of each channel's target costs, f64 ``[H, D]``.

    ``S`` of ``kvq_formats.feedback``, by channel, for the feedback that ``fit_feedback`` gives.
    """
    order, factor = factorise(moment, damping=DAMPING)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    return torch.empty_like(pivots).scatter_(1, order, pivots)
