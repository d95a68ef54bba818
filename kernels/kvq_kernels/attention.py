"""Attention over a packed cache in plain torch: what kernels are tested against.

One row's cache is read in *splits*: blocks of pages, decoded and rotated as they are read, and
blocks of exact tokens (sinks, the unfinished page, recent tokens). Each split is scored by itself
and merged into a running softmax by its log-sum-exp, so that nothing larger than a block exists in
decoded form. Everything is computed in f32, for queries in f64 in f64.

Tokens of a row are counted from 0, padding left out. The **runtime rule** (``docs/method.md``): the
query at index ``n`` reads a page from its codes if and only if the page ends before
``n - recent_tokens``; its own page, the recent tokens and the sinks are read exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS

QUERY_BLOCK = 128
"""Query tokens that are scored at a time."""

EXACT_BLOCK = 2048
"""Exact tokens that are scored at a time."""

DECODED_BLOCK_BYTES = 4 * 2**20
"""Decoded keys of a block of pages, and as much for values: small enough to stay in a cache."""

SCORE_BLOCK_BYTES = 8 * 2**20
"""Scores of a block, f32. More of either is no faster on a CPU, and takes memory."""


@dataclass(frozen=True)
class DecodedPages:
    """Numbers of ``P`` pages, f32.

    Fields:
        keys: ``[P, H, 256, D]``, rotated to their positions.
        values: ``[P, H, D, 256]``, channel-major, in units of the token's half-range.
        half_range, center: ``[P, S, 256]``, S is 1 or H; None where values are in their own units.
    """

    keys: Tensor
    values: Tensor
    half_range: Tensor | None
    center: Tensor | None


class RowPages(Protocol):
    """Pages of one row, in order.

    Fields:
        lengths: valid tokens of each page; fewer than 256 where the row was cropped into it.
        ends: index of each page's last valid token in its row.
    """

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def ends(self) -> Sequence[int]: ...

    def read(self, first: int, last: int) -> DecodedPages:
        """Decode pages ``first`` to ``last - 1``."""
        ...


@dataclass(frozen=True)
class ExactTokens:
    """Tokens of one row that are held exactly: ``sinks`` sinks, then all from index ``start`` on.

    Fields:
        keys: f32 ``[H, E, D]``, rotated.
        values: ``[H, E, D]``, any float dtype.
        sinks: how many of the E are sinks; their indices are 0, 1, ...
        start: index of the first token after the pages that were complete before this forward.
    """

    keys: Tensor
    values: Tensor
    sinks: int
    start: int

    def place(self, index: int) -> int:
        """Where in E the token at ``index`` of the row is."""
        return index if index < self.sinks else self.sinks + index - self.start


@dataclass(frozen=True)
class AttentionOptions:
    """How scores become weights.

    Fields:
        scaling: factor of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None without.
        sink_logits: ``[HQ]``, learned logits that take part in the softmax and attend to nothing
            (gpt-oss); None without.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


def attend(
    query: Tensor,
    *,
    index: int,
    pages: RowPages,
    held_pages: int,
    exact: ExactTokens,
    recent_tokens: int,
    options: AttentionOptions,
    exact_prefill: bool = False,
) -> Tensor:
    """Causal attention of consecutive tokens of one row over its packed cache.

    Args:
        query: ``[HQ, T, D]``, rotated; the last T tokens of the row.
        index: index of the first query in its row.
        pages: all complete pages, those included that these T tokens completed.
        held_pages: pages that were complete before; their exact numbers are gone, and every query
            reads them from their codes.
        exact: sinks and all tokens after the held pages.
        recent_tokens: newest tokens that a query reads exactly.
        options: scaling and the like.
        exact_prefill: the queries read all tokens after the held pages exactly.

    Returns: f32 ``[T, HQ, D]``, f64 for queries in f64.
    """
    HQ, T, D = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    H = exact.keys.shape[0]
    G = HQ // H
    output = query.new_empty(T, HQ, D, dtype=dtype)
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        q = query[:, start:stop].to(dtype) * options.scaling
        q = q.reshape(H, G * (stop - start), D)
        merge = _Merge(q, softcap=options.softcap)
        first, last = index + start, index + stop - 1
        visible = held_pages if exact_prefill else _coded_pages(pages, last - recent_tokens)
        for block in _blocks(max(held_pages, visible), merge.pages_a_block):
            _add_pages(merge, pages, block, held_pages, first - recent_tokens, G)
        for low, high in _exact_ranges(exact, first, last, recent_tokens, exact_prefill):
            _add_exact(merge, exact, low, high, first, None if exact_prefill else recent_tokens, G)
        if options.sink_logits is not None:
            merge.add_logits(
                options.sink_logits.to(dtype).repeat_interleave(stop - start).view(H, -1)
            )
        output[start:stop] = merge.result().view(HQ, stop - start, D).transpose(0, 1)
    return output


def scratch_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tokens: int,
    coded_pages: int,
    exact_tokens: int,
) -> int:
    """Bytes that ``attend`` holds at its worst moment beside its arguments.

    Args:
        num_heads, num_kv_heads, head_dim: HQ, H, D.
        tokens: queries of the row, T.
        coded_pages: pages that they read from codes.
        exact_tokens: tokens that ``QUERY_BLOCK`` of them read exactly.

    Counted in f32: the output, a running softmax of a block of queries with what a split adds to
    it, and the workspace that pages are decoded in: keys, values, and twice the half of one of them
    for indices. And of the split either scores of pages, and queries or results once a page, or
    exact tokens, their scores, a mask, its inverse and one of fewer heads.
    """
    H, D = num_kv_heads, head_dim
    G = num_heads // H
    M = G * min(tokens, QUERY_BLOCK)
    pages = min(coded_pages, _pages_a_block(H, M, D))
    workspace = 3 * 4 * H * PAGE_TOKENS * D * min(coded_pages, _pages_a_block(H, G, D))
    coded = 4 * H * pages * (PAGE_TOKENS * M + M * D)
    # Where scores take little, what turns keys takes more; then there are cosines and sines.
    coded = max(coded, 4 * H * pages * PAGE_TOKENS * D) + 4 * pages * PAGE_TOKENS * D
    block = min(exact_tokens, EXACT_BLOCK)
    exact = 4 * H * (block * (2 * D + M) + M * D) + (2 * M + M // G) * block
    running = 4 * H * M * (3 * D + 3)
    return workspace + max(coded, exact) + running + 4 * num_heads * tokens * D


def _pages_a_block(H: int, M: int, D: int) -> int:
    decoded = DECODED_BLOCK_BYTES // (4 * H * PAGE_TOKENS * D)
    scored = SCORE_BLOCK_BYTES // (4 * H * M * PAGE_TOKENS)
    return max(1, min(decoded, scored))


class _Merge:
    """A running softmax over splits: largest score, sum of weights, weighted values.

    ``query`` is f32 ``[H, M, D]``, scaled; M stands for the G heads of a group times the queries.
    """

    def __init__(self, query: Tensor, *, softcap: float | None) -> None:
        H, M, D = query.shape
        self.query = query
        self.softcap = softcap
        self.largest = query.new_full((H, M), -torch.inf)
        self.total = query.new_zeros(H, M)
        self.weighted = query.new_zeros(H, M, D)

    @property
    def pages_a_block(self) -> int:
        H, M, D = self.query.shape
        return _pages_a_block(H, M, D)

    def add(self, keys: Tensor, mask: Tensor | None, weigh: Callable[[Tensor], Tensor]) -> None:
        """Take in a split.

        ``keys`` f32 ``[P, H, N, D]``; ``mask`` bool that broadcasts to the scores ``[P, H, M, N]``,
        True where a query sees a token; ``weigh`` gives the values weighted by f32
        ``[P, H, M, N]``, as ``[H, M, D]``.
        """
        scores = torch.matmul(self.query, keys.mT.to(self.query.dtype))
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf)
        largest = torch.maximum(self.largest, scores.amax(dim=(0, 3)))
        # Where nothing has been seen yet the exponent must not become inf - inf.
        finite = torch.where(largest == -torch.inf, 0.0, largest)
        weights = scores.sub_(finite[:, :, None]).exp_()
        decay = (self.largest - finite).exp_()
        self.total.mul_(decay).add_(weights.sum(dim=(0, 3)))
        self.weighted.mul_(decay[..., None]).add_(weigh(weights))
        self.largest = largest

    def add_logits(self, logits: Tensor) -> None:
        """Take in one more score a query, f32 ``[H, M]``, that carries no value."""
        largest = torch.maximum(self.largest, logits)
        decay = (self.largest - largest).exp_()
        self.total.mul_(decay).add_((logits - largest).exp_())
        self.weighted.mul_(decay[..., None])
        self.largest = largest

    def result(self) -> Tensor:
        return self.weighted / self.total[..., None]


def _coded_pages(pages: RowPages, before: int) -> int:
    """How many pages end before ``before``."""
    count = len(pages.ends)
    while count and pages.ends[count - 1] >= before:
        count -= 1
    return count


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _add_pages(
    merge: _Merge,
    pages: RowPages,
    block: tuple[int, int],
    held_pages: int,
    before: int,
    G: int,
) -> None:
    """Score pages ``block``; ``before`` is the limit of the first query, each next has one more."""
    start, stop = block
    decoded = pages.read(start, stop)
    device = decoded.keys.device
    mask: Tensor | None = None
    lengths = pages.lengths[start:stop]
    if min(lengths) < PAGE_TOKENS:
        places = torch.arange(PAGE_TOKENS, device=device)
        mask = (places < torch.tensor(lengths, device=device)[:, None])[:, None, None, :]
    if stop > held_pages:
        # Pages that these very tokens completed: later queries read them, earlier ones do not yet.
        ends = torch.tensor(pages.ends[start:stop], device=device)
        ends[: max(0, held_pages - start)] = -PAGE_TOKENS
        T = merge.query.shape[1] // G
        limits = before + torch.arange(T, device=device).repeat(G)
        seen = (ends[:, None] < limits)[:, None, :, None]
        mask = seen if mask is None else mask & seen

    values = decoded.values.mT.to(merge.query.dtype)

    def weigh(weights: Tensor) -> Tensor:
        if decoded.half_range is None or decoded.center is None:
            return torch.matmul(weights, values).sum(0)
        # A value is half_range * z + center of its token, so that both fold into the weights.
        centers = decoded.center[..., None].to(weights.dtype)
        centered = torch.matmul(weights, centers).sum(0)
        scaled = weights.mul_(decoded.half_range[:, :, None, :])
        return torch.matmul(scaled, values).sum(0).add_(centered)

    merge.add(decoded.keys, mask, weigh)


def _exact_ranges(
    exact: ExactTokens, first: int, last: int, recent_tokens: int, exact_prefill: bool
) -> Iterator[tuple[int, int]]:
    """Places that some query from index ``first`` to ``last`` reads exactly."""
    high = exact.place(last) + 1
    low = exact.sinks
    if not exact_prefill:
        # Whole pages that end before the first query's limit are read from codes by all of them.
        coded = max(0, (first - recent_tokens - exact.start) // PAGE_TOKENS)
        low = min(exact.sinks + coded * PAGE_TOKENS, high)
    parts = [(0, high)] if low <= exact.sinks else [(0, exact.sinks), (low, high)]
    for start, stop in parts:
        for begin, end in _blocks(stop - start, EXACT_BLOCK):
            yield start + begin, start + end


def _add_exact(
    merge: _Merge,
    exact: ExactTokens,
    low: int,
    high: int,
    first: int,
    recent_tokens: int | None,
    G: int,
) -> None:
    """Score exact tokens at places ``low`` to ``high - 1``; all of them if there is one query."""
    device = exact.keys.device
    mask: Tensor | None = None
    T = merge.query.shape[1] // G
    if T > 1:
        places = torch.arange(low, high, device=device)
        after = places >= exact.sinks
        indices = torch.where(after, exact.start + places - exact.sinks, places)
        queries = first + torch.arange(T, device=device)
        seen = indices <= queries[:, None]
        if recent_tokens is not None:
            ends = exact.start + (places - exact.sinks) // PAGE_TOKENS * PAGE_TOKENS
            ends = ends + PAGE_TOKENS - 1
            seen &= ~after | (ends >= queries[:, None] - recent_tokens)
        mask = seen.repeat(G, 1)
    values = exact.values[:, low:high].to(merge.query.dtype)
    merge.add(exact.keys[None, :, low:high], mask, lambda weights: torch.matmul(weights[0], values))
