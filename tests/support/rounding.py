"""Which differences between two packings of the same tokens roundings explain.

The f32 keys and values that two feedings packed are known, and so is the *span* that each entry
lies in. ``kvq_formats.pages`` is followed through in f64 with spans in place of numbers, each f32
operation widening a span by ``1 + u`` (``u = 2**-24``, the unit roundoff), which no f32 evaluation
leaves. A stored number must lie between what the two ends of its span decide. Where no decision's
boundary (midpoint, ``|z| = 1``, top-n, last place, fp16 rounding, residual step) lies in the span,
both ends decide alike, and so must both feedings. Later decisions take the earlier ones, scales and
codes, as the feedings stored them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvq_formats import outliers, packing
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.pages import HALF_LARGEST, HALF_SMALLEST, KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, ValueParameters

# A little more than the unit roundoff of f32, for the roundings of f64 made here.
ROUNDOFF = 2.0**-24 * (1 + 2.0**-20)

Pair = tuple[Tensor, Tensor]


class Span(NamedTuple):
    """Numbers that lie between two ends, f64."""

    low: Tensor
    high: Tensor

    def rounded(self) -> Span:
        """What an f32 operation makes of an exact result in the span."""
        return Span(self.low - ROUNDOFF * self.low.abs(), self.high + ROUNDOFF * self.high.abs())

    def __neg__(self) -> Span:
        return Span(-self.high, -self.low)

    def minus(self, other: Span) -> Span:
        return Span(self.low - other.high, self.high - other.low).rounded()

    def times(self, positive: Span) -> Span:
        ends = [end * factor for end in self for factor in positive]
        return Span(torch.stack(ends).amin(0), torch.stack(ends).amax(0)).rounded()

    def over(self, positive: Span) -> Span:
        return self.times(Span(1 / positive.high, 1 / positive.low))

    def absolute(self) -> Span:
        inside = (self.low <= 0) & (self.high >= 0)
        least = torch.minimum(self.low.abs(), self.high.abs()).masked_fill(inside, 0.0)
        return Span(least, torch.maximum(self.low.abs(), self.high.abs()))


def hull(numbers: Pair) -> Span:
    """The smallest spans that hold both of two numbers."""
    first, second = (x.double() for x in numbers)
    return Span(torch.minimum(first, second), torch.maximum(first, second))


@dataclass(frozen=True)
class Tally:
    """Decisions of one kind.

    Fields:
        compared: how many both feedings made.
        open: those with a boundary in their span.
        differing: those that the feedings made differently.
        unexplained: those that one of them made as no number in the span would have it.
    """

    compared: int
    open: int
    differing: int
    unexplained: int

    @classmethod
    def of(cls, found: Pair, limits: Pair, made: Pair | None = None) -> Tally:
        """``made`` says which decisions each feeding made; None for all."""
        first, second = (x.double() for x in found)
        low, high = (x.double() for x in limits)
        in_first, in_second = made or (torch.ones_like(first, dtype=torch.bool),) * 2
        both = in_first & in_second
        outside = ((first < low) | (first > high)) & in_first
        outside |= ((second < low) | (second > high)) & in_second
        counted = (both, both & (low < high), both & (first != second), outside)
        return cls(*(int(which.sum()) for which in counted))


@dataclass(frozen=True)
class Stored:
    """The decisions in pages, ``[P, H, 256, D]``: codes, which outliers are kept, their steps."""

    codes: Tensor
    kept: Tensor
    steps: Tensor

    def same(self, other: Stored) -> Tensor:
        """Which entries are stored alike, but for their token's scale."""
        alike = (self.codes == other.codes) & (self.kept == other.kept)
        return alike & (self.steps == other.steps)

    @classmethod
    def of(cls, pages: KeyPages | ValuePages) -> Stored:
        bits = pages.words.shape[2]
        if isinstance(pages, KeyPages):
            codes = packing.unpack_keys(pages.words, bits=bits).long()
            index_bits = outliers.channel_bits(codes.shape[-1])
            counts = pages.outlier_counts.long()
        else:
            codes = packing.unpack_values(pages.words, bits=bits).long()
            index_bits = outliers.TOKEN_BITS
            counts = pages.outlier_offsets.long().diff()
        kept, steps = torch.zeros_like(codes, dtype=torch.bool), torch.zeros_like(codes)
        entries, index = outliers.unpack_entries(pages.outliers, bits=index_bits)
        for p, h in torch.cartesian_prod(*map(torch.arange, codes.shape[:2])).tolist():
            run = torch.repeat_interleave(counts[p, h])
            named = index[p, h, : len(run)]
            token, channel = (run, named) if isinstance(pages, KeyPages) else (named, run)
            kept[p, h, token, channel] = True
            steps[p, h, token, channel] = entries[p, h, : len(run)].long()
        return cls(codes, kept, steps)


def explain_keys(
    keys: Pair, pages: tuple[KeyPages, KeyPages], parameters: KeyParameters, config: KVQConfig
) -> dict[str, Tally]:
    """Compare the pages that two feedings made of their keys, f32 ``[P, H, 256, D]``."""
    half_range, center = (
        hull((x[:, None], x[:, None])) for x in (parameters.half_range, parameters.center)
    )
    z = hull(keys).minus(center).over(half_range)
    candidates = (z.absolute().low > 1, z.absolute().high > 1)
    D = keys[0].shape[-1]
    room = outliers.key_pool_capacity(config, D)
    index_bits = outliers.channel_bits(D)
    stored = (Stored.of(pages[0]), Stored.of(pages[1]))
    found = _explain(stored, z, half_range, candidates, parameters, index_bits, room)
    return {f"key {kind}": tally for kind, tally in found.items()}


def explain_values(
    values: Pair,
    pages: tuple[ValuePages, ValuePages],
    parameters: ValueParameters,
    config: KVQConfig,
) -> dict[str, Tally]:
    """Compare the pages that two feedings made of their values, f32 ``[P, H, 256, D]``."""
    P, H, T, D = values[0].shape
    x = hull(values)
    n = outliers.value_outliers_per_side(config, H, D)
    shared = config.value_grain == "token"
    # One vector a scale.
    vectors = Span(*(e.transpose(1, 2).reshape(P, 1, T, -1) if shared else e for e in x))
    size = vectors.low.shape[-1]
    # The k-th smallest of numbers in spans lies between the k-th smallest ends.
    halves = Span(*(end.sort(-1).values / 2 for end in vectors))
    lower, upper = (Span(*(end[..., k] for end in halves)) for k in (n, size - 1 - n))
    # Every step to fp16 is monotonic, so that the ends give the limits.
    half_range, center = (
        tuple(end.float().clamp(-HALF_LARGEST, HALF_LARGEST).half() for end in span)
        for span in (upper.minus(lower), upper.minus(-lower))
    )
    half_range = tuple(end.clamp(min=HALF_SMALLEST) for end in half_range)
    scales = tuple(page.scales for page in pages)
    limits = tuple(torch.stack(ends, -1) for ends in zip(half_range, center, strict=True))
    tallies = {"value scale": Tally.of(scales, limits)}

    half_range, center = (hull(tuple(s[..., i : i + 1] for s in scales)) for i in (0, 1))
    z = x.minus(center).over(half_range)
    candidates = _among_extremes(vectors, n)
    if shared:
        candidates = tuple(c.reshape(P, T, H, D).transpose(1, 2) for c in candidates)
    stored = (Stored.of(pages[0]), Stored.of(pages[1]))
    room = outliers.value_list_capacity(config, H, D)
    found = _explain(stored, z, half_range, candidates, parameters, outliers.TOKEN_BITS, room)
    return tallies | {f"value {kind}": tally for kind, tally in found.items()}


def _explain(
    stored: tuple[Stored, Stored],
    z: Span,
    half_range: Span,
    candidates: Pair,
    parameters: KeyParameters | ValueParameters,
    index_bits: int,
    room: int,
) -> dict[str, Tally]:
    """Codes, kept outliers and residuals; ``candidates`` are outliers for sure, and possible."""
    first, second = stored
    codebook = parameters.codebook
    ends = tuple((end[..., None] > codebook.midpoints.double()).sum(-1) for end in z)
    tallies = {"code": Tally.of((first.codes, second.codes), ends)}
    decoded = hull(tuple(codebook.decode_entries[s.codes] for s in stored))
    residual = z.minus(decoded)
    kept = _among_largest(residual.absolute().times(half_range), candidates, room)
    tallies["outlier"] = Tally.of((first.kept, second.kept), kept)
    step = torch.tensor(parameters.outlier_step, dtype=torch.float64)
    # The step is rounded to f32, too, before it divides.
    steps = residual.over(Span(step, step).rounded())
    limits = tuple(end.round().clamp(*outliers.residual_limits(index_bits)) for end in steps)
    tallies["residual"] = Tally.of((first.steps, second.steps), limits, (first.kept, second.kept))
    return tallies


def _among_extremes(x: Span, n: int) -> Pair:
    """Which entries of the last axis are among its n smallest or largest: surely, and possibly."""
    size = x.low.shape[-1]
    x = Span(*(end.contiguous() for end in x))
    lows, highs = (end.sort(-1).values for end in x)
    reach_down = torch.searchsorted(lows, x.high, right=True)
    reach_up = size - torch.searchsorted(highs, x.low)
    below, above = size - reach_up, size - reach_down
    # An entry reaches itself.
    surely = (reach_down - 1 < n) | (reach_up - 1 < n)
    return surely, (below < n) | (above < n)


def _among_largest(size: Span, candidates: Pair, room: int) -> Pair:
    """Which candidates find room in their page and head, largest first: surely, and possibly."""
    surely, possibly = (c.flatten(2) for c in candidates)
    low, high = (end.flatten(2) for end in size)
    E = low.shape[-1]
    lows = low.masked_fill(~surely, -1.0).sort(-1).values
    highs = high.masked_fill(~possibly, -1.0).sort(-1).values
    rivals = E - torch.searchsorted(highs, low) - 1
    larger = E - torch.searchsorted(lows, high, right=True)
    limits = surely & (rivals < room), possibly & (larger < room)
    return tuple(limit.view(candidates[0].shape) for limit in limits)


def paged(x: Tensor, *, sinks: int, pages: int) -> Tensor:
    """Of ``[H, T, D]`` the tokens of the first pages after the sinks, ``[P, H, 256, D]``."""
    H, _, D = x.shape
    inside = x[:, sinks : sinks + pages * PAGE_TOKENS]
    return inside.reshape(H, pages, PAGE_TOKENS, D).transpose(0, 1)
