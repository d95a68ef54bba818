"""Error feedback: what rounding one channel lost is made good in the channels after it.

A head's numbers are rounded one channel after the other, and each error is spread over the channels
that are still to come, where the loss cannot tell it from no error. With ``M`` the second moment of
the loss's gradient at a head's D numbers and ``M = (I + G) S (I + G)^T``, ``G`` strictly upper
triangular and ``S`` diagonal, the target of channel j is

    target_j = x_j + sum over i < j of  error_i * G[i, j],    error_i = x_i - decoded_i

and ``x = z + shift`` the normalised numbers and a constant of each channel. Without it the expected
loss of all errors is the sum of ``S_j * (target_j - decoded_j)**2``, which is what rounding to the
nearest entry makes small. For weights this is LDLQ (Chee et al., QuIP, arXiv 2307.13304, section 3)
and, written otherwise, GPTQ; for a cache it costs no bit: bytes mean what they meant before, only
their choice differs, and it depends on nothing but the token itself.

The shift makes decoded numbers keep their channel's mean: rounding against one codebook for all
channels moves it, and attention to many tokens adds that up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvq_formats.codebook import Codebook

LARGEST_GAIN = torch.finfo(torch.float16).max

BLOCK_ENTRIES = 2**18
"""Numbers that are shaped at a time: 1 MiB in f32, which stays in a core's cache."""


@dataclass(frozen=True)
class Feedback:
    """How errors travel between the channels of each head.

    Fields:
        order: i64 ``[H, D]``, channels of each head in the order that they are rounded in.
        gains: f16 ``[H, D * (D - 1) / 2]``, ``G`` in that order, in units of the normalised range:
            its rows above the diagonal, one behind the other (``gain_row``).
        shift: f32 ``[H, D]``, by channel and not in that order, in units of the normalised range:
            what is added to every number of a channel before anything else.
    """

    order: Tensor
    gains: Tensor
    shift: Tensor

    @classmethod
    def fit(cls, moment: Tensor, *, damping: float) -> Self:
        """Order and gains of the least expected loss; shifts of zero.

        Args:
            moment: f64 ``[H, D, D]``, second moment of the loss's gradient at the normalised
                numbers of each head.
            damping: what is added to the diagonal, as a share of its mean: more means less trust
                in what calibration text of this length says of rare directions.

        Channels whose errors weigh most come first, so that the rest can make them good. A head
        that the loss does not reach passes no error on.
        """
        order, factor = factorise(moment, damping=damping)
        gains = factor / factor.diagonal(dim1=1, dim2=2)[:, None, :]
        row, column = torch.triu_indices(moment.shape[1], moment.shape[1], offset=1)
        packed = gains[:, row, column].clamp(-LARGEST_GAIN, LARGEST_GAIN)
        shift = torch.zeros(order.shape, dtype=torch.float32, device=order.device)
        return cls(order, packed.half(), shift)

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.order.to(device), self.gains.to(device), self.shift.to(device))

    def shifted(self, shift: Tensor) -> Self:
        """The same with this shift, f32 ``[H, D]``, in place of its own."""
        return replace(self, shift=shift)

    def gain_row(self, i: int) -> Tensor:
        """What of the i-th channel's error goes to those after it, f32 ``[H, D - 1 - i]``."""
        D = self.order.shape[1]
        start = i * (2 * D - i - 1) // 2
        return self.gains[:, start : start + D - 1 - i].float()

    def reordered(self, channels: Tensor) -> Self:
        """For heads whose channel ``i`` is what was channel ``channels[i]``; i64 ``[D]``."""
        places = torch.empty_like(channels)
        places[channels] = torch.arange(len(channels), device=channels.device)
        order = places.to(self.order.device)[self.order]
        return replace(self, order=order, shift=self.shift[:, channels.to(self.shift.device)])


def factorise(moment: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """The order of ``Feedback.fit``, and ``U = (I + G) S^(1/2)`` in it: f64 ``[H, D, D]``."""
    diagonal = moment.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    index = order[:, :, None].expand_as(moment)
    ordered = moment.gather(1, index).gather(2, index.mT)
    mean = diagonal.mean(dim=-1)
    floor = torch.where(mean > 0, damping * mean, 1.0)
    ordered = ordered + floor[:, None, None] * torch.eye(moment.shape[1], dtype=moment.dtype)
    # M = U U^T with U upper triangular is the Cholesky factor of M turned end for end.
    return order, torch.linalg.cholesky(ordered.flip(1, 2)).flip(1, 2)


def shape_errors(
    z: Tensor,
    codebook: Codebook,
    feedback: Feedback,
    *,
    is_outlier: Tensor | None,
) -> Tensor:
    """Targets f32 ``[P, H, T, D]``: what to round instead of the normalised numbers ``z``.

    Args:
        z: f32 ``[P, H, T, D]``, in units of the normalised range.
        codebook: chooses the codes.
        feedback: of the layer's keys or values.
        is_outlier: bool, expands to ``z``: numbers that are stored exactly and have no error; None:
            those whose target lies beyond [-1, 1].

    An outlier that later finds no room in its page stays clamped, and nobody makes that good.
    Products and sums, the shift's first, are rounded one by one, in the order of the channels, so
    that every implementation gives the same bits.
    """
    P, H, T, D = z.shape
    tables = feedback.to(z.device)
    midpoints = codebook.midpoints.to(z.device)
    entries = codebook.decode_entries.to(z.device)
    shaped = torch.empty_like(z)
    step = max(1, BLOCK_ENTRIES // max(H * T * D, 1))
    for first in range(0, P, step):
        pages = slice(first, first + step)
        shifted = z[pages] + tables.shift[:, None, :]
        exact, order = _channels_in_order(shifted, tables.order)
        outliers = None
        if is_outlier is not None:
            outliers, _ = _channels_in_order(is_outlier.expand_as(z)[pages], tables.order)
        targets = exact.clone()
        for i in range(D):
            target = targets[i]
            decoded = entries[torch.bucketize(target, midpoints)]
            exactly = target.abs() > 1 if outliers is None else outliers[i]
            error = exact[i] - torch.where(exactly, target, decoded)
            spread = tables.gain_row(i).mT[:, :, None] * error
            targets[i + 1 :] += spread
        by_channel = torch.empty_like(exact).scatter_(0, order, targets)
        shaped[pages] = by_channel.unflatten(2, (-1, T)).permute(2, 1, 3, 0)
    return shaped


def _channels_in_order(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """``[P, H, T, D]`` -> ``[D, H, P * T]`` with channels in order, and the index that did it.

    So a channel's numbers lie side by side.
    """
    by_channel = x.permute(3, 1, 0, 2).flatten(2)
    index = order.mT[:, :, None].expand_as(by_channel)
    return by_channel.gather(0, index), index
