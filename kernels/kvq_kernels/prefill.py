"""Attention of many queries of one row over its packed cache: blocks of pages, then exact tokens.

What ``kvq_kernels.attention.attend`` computes, by kernels. A block of pages is decoded to f16,
rotated, read by all queries, and overwritten by the next: memory does not grow with the context.
Each token carries two numbers: the first and the last index of the queries that see it. These say
all of the runtime rule (``kvq_kernels.attention``):

==============================================  ===========================  =====================
token                                           from                         until
==============================================  ===========================  =====================
of a page that was complete before              always                       always
of a page that these tokens completed           page's end + recent + 1      always
behind the length of a page that was cut        never                        never
exact, among the sinks                          its own index                always
exact, behind them                              its own index                page's end + recent
==============================================  ===========================  =====================

With ``exact_prefill`` exact tokens are seen for good, and only pages that were complete before are
read. Nothing here waits for the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import triton
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.pages import KeyPages, ValuePages
from kvq_kernels.attention import AttentionOptions, ExactTokens
from kvq_kernels.dequantize_pages import dequantize_keys, dequantize_values
from kvq_kernels.kernel_tables import KernelTables, channel_tile
from kvq_kernels.launch import current, exact_precision, is_amd
from kvq_kernels.phases import Phases
from kvq_kernels.prefill_block import EVER, attend_block
from kvq_kernels.scores import score_arguments
from kvq_kernels.workspace import Workspace

BLOCK_BYTES = 64 * 2**20
"""Decoded keys and values of a block of pages, f16. Larger saves reading the running softmax."""

_ALWAYS: Final = EVER.value


@dataclass(frozen=True, eq=False)
class KernelPages:
    """Pages of one row, in order, as kernels read them; lengths and ends as ``RowPages`` has them.

    Fields:
        key_pages, value_pages: the pool, P pages in one piece.
        ids: i32 or i64 ``[n]``, on the device: where the row's pages are in the pool.
        lengths: valid tokens of each page.
        ends: index of each page's last valid token in its row.
        tables, phases: of the layer, on the device.
        irregular_positions: i32 ``[I, 256]`` (``PackedRows``); None if there is none.
        workspace: where buffers come from.
    """

    key_pages: KeyPages
    value_pages: ValuePages
    ids: Tensor
    lengths: Sequence[int]
    ends: Sequence[int]
    tables: KernelTables
    phases: Phases
    irregular_positions: Tensor | None = None
    workspace: Workspace = field(default_factory=Workspace)

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Decode pages ``first`` to ``last - 1``.

        Returns: (keys, rotated, values), f16 ``[H, (last - first) * 256, D]``, there until the
        next call.
        """
        tables, ids = self.tables, self.ids[first:last]
        shape = (tables.num_kv_heads, len(ids) * PAGE_TOKENS, tables.head_dim)
        keys = self.workspace.take("prefill keys", shape, torch.float16, ids.device)
        values = self.workspace.take("prefill values", shape, torch.float16, ids.device)
        dequantize_keys(
            self.key_pages,
            ids,
            tables,
            self.phases,
            irregular_positions=self.irregular_positions,
            out=keys,
        )
        dequantize_values(self.value_pages, ids, tables, out=values)
        return keys, values


@dataclass(frozen=True)
class _Block:
    """Keys and values of one launch, ``[H, N, D]``.

    Fields:
        seen: i32 ``[2, N]``, first and last index of the queries that see a token; None if all do.
        coded: decoded pages, f16; else exact tokens.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor | None
    coded: bool


def attend(
    query: Tensor,
    *,
    index: int,
    pages: KernelPages,
    held_pages: int,
    exact: ExactTokens,
    recent_tokens: int,
    options: AttentionOptions,
    exact_prefill: bool = False,
) -> Tensor:
    """As ``kvq_kernels.attention.attend``; computed and returned in f32, ``[T, HQ, D]``.

    Keys of pages, queries that meet them and weights of their values are rounded to f16; exact
    tokens are multiplied in tf32, for queries in f32 with more bits (``exact_precision``).
    """
    HQ, T, D = query.shape
    H = exact.keys.shape[0]
    query = _dense(query.float() if query.dtype == torch.float64 else query)
    workspace, device = pages.workspace, query.device
    output = torch.empty(T, HQ, D, dtype=torch.float32, device=device)
    largest = workspace.take("prefill largest", (T, HQ), torch.float32, device)
    total = workspace.take("prefill total", (T, HQ), torch.float32, device)
    sinks = options.sink_logits
    sinks = None if sinks is None else sinks.float().contiguous()
    shared: dict[str, Any] = {
        "query": query,
        "output": output,
        "largest": largest,
        "total": total,
        # Where a kernel has no use for a tensor it gets one that it does not touch.
        "sink_logits": output if sinks is None else sinks,
        "query_head_stride": query.stride(0),
        "query_token_stride": query.stride(1),
        "queries": T,
        "index": index,
        **score_arguments(options),
        "H": H,
        "G": HQ // H,
        "D": D,
        "D_TILE": channel_tile(D),
        "SINK_LOGITS": sinks is not None,
    }
    visible = held_pages
    if not exact_prefill:
        newest = index + T - 1
        visible = max(held_pages, bisect_left(pages.ends, newest - recent_tokens))
    recent = None if exact_prefill else recent_tokens
    parts = _exact_parts(exact, index, recent)
    fresh = True
    with current(device):
        for block in _coded_blocks(pages, visible, held_pages, recent_tokens):
            _launch(block, shared, fresh=fresh, last=False)
            fresh = False
        for low, high in parts:
            block = _exact_block(exact, low, high, recent, workspace)
            _launch(block, shared, fresh=fresh, last=high == parts[-1][1])
            fresh = False
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
        exact_tokens: tokens that some of them read exactly.

    Counted: the output and two numbers a query and head, f32; a block of decoded pages, f16; who
    sees what, two i32 a token of a block or exact token, and two a page.
    """
    pages = min(coded_pages, _pages_a_block(num_kv_heads, head_dim))
    running = 4 * tokens * num_heads * (head_dim + 2)
    decoded = 2 * 2 * num_kv_heads * PAGE_TOKENS * head_dim * pages
    return running + decoded + 8 * max(PAGE_TOKENS * pages, exact_tokens) + 8 * pages


def _pages_a_block(H: int, D: int) -> int:
    return max(1, BLOCK_BYTES // (2 * 2 * H * PAGE_TOKENS * D))


def _coded_blocks(
    pages: KernelPages, visible: int, held_pages: int, recent_tokens: int
) -> Iterator[_Block]:
    """The first ``visible`` pages, decoded block by block."""
    size = _pages_a_block(pages.tables.num_kv_heads, pages.tables.head_dim)
    for first in range(0, visible, size):
        last = min(first + size, visible)
        keys, values = pages.read(first, last)
        lengths = pages.lengths[first:last]
        seen = None
        if last > held_pages or min(lengths) < PAGE_TOKENS:
            opens = [
                -1 if first + place < held_pages else min(end + recent_tokens + 1, _ALWAYS)
                for place, end in enumerate(pages.ends[first:last])
            ]
            seen = _seen_of_pages(opens, lengths, pages.workspace, keys.device)
        yield _Block(keys, values, seen, coded=True)


def _seen_of_pages(
    opens: Sequence[int], lengths: Sequence[int], workspace: Workspace, device: torch.device
) -> Tensor:
    """i32 ``[2, n * 256]``; ``opens`` is the first index of the queries that see a page."""
    seen = workspace.take("prefill seen", (2, len(opens), PAGE_TOKENS), torch.int32, device)
    by_page = torch.tensor([opens, lengths], dtype=torch.int32).to(device, non_blocking=True)
    seen[0].copy_(by_page[0, :, None])
    # The sign of (length - 1 - place) becomes the least number, which no query has, or the largest.
    torch.arange(-1, -1 - PAGE_TOKENS, -1, out=seen[1, 0])
    seen[1, 1:].copy_(seen[1, 0])
    seen[1].add_(by_page[1, :, None]).bitwise_right_shift_(31).bitwise_xor_(_ALWAYS)
    return seen.view(2, -1)


def _exact_parts(
    exact: ExactTokens, index: int, recent_tokens: int | None
) -> list[tuple[int, int]]:
    """Places of exact tokens that a launch reads: sinks, and those that some query sees.

    A launch reads one range of tokens for a tile of queries, and the sinks are far from the rest.
    """
    room, low = exact.keys.shape[1], exact.sinks
    if recent_tokens is not None:
        coded = max(0, (index - recent_tokens - exact.start) // PAGE_TOKENS)
        low = min(low + coded * PAGE_TOKENS, room)
    parts = [(low, high) for low, high in ((0, exact.sinks), (low, room)) if low < high]
    assert parts, "a query is itself among the exact tokens"
    return parts


def _exact_block(
    exact: ExactTokens, low: int, high: int, recent_tokens: int | None, workspace: Workspace
) -> _Block:
    """Exact tokens at places ``low`` to ``high - 1``, all sinks or none."""
    device, count = exact.keys.device, high - low
    # Both vectors begin at multiples of 16 bytes.
    room = -(-count // 4) * 4
    seen = workspace.take("prefill seen", (2, room), torch.int32, device)[:, :count]
    after = low - exact.sinks
    first = low if after < 0 else exact.start + after
    torch.arange(first, first + count, out=seen[0])
    if after < 0 or recent_tokens is None:
        seen[1].fill_(_ALWAYS)
    else:
        # ``low`` is the first token of a page.
        torch.arange(count, out=seen[1])
        seen[1].div_(PAGE_TOKENS, rounding_mode="floor").mul_(PAGE_TOKENS)
        seen[1].add_(min(first + PAGE_TOKENS - 1 + recent_tokens, _ALWAYS - count))
    return _Block(exact.keys[:, low:high], exact.values[:, low:high], seen, coded=False)


def _launch(block: _Block, shared: dict[str, Any], *, fresh: bool, last: bool) -> None:
    keys, values = _dense(block.keys), _dense(block.values)
    seen = block.seen
    precision = "half" if block.coded else exact_precision(shared["query"].dtype)
    cut = tiles(shared["D_TILE"], precision, amd=is_amd())
    grid = (triton.cdiv(shared["queries"] * shared["G"], cut["ROW_TILE"]), shared["H"])
    no_use = shared["largest"]
    attend_block[grid](
        keys=keys,
        values=values,
        seen_from=no_use if seen is None else seen[0],
        seen_until=no_use if seen is None else seen[1],
        key_head_stride=keys.stride(0),
        key_token_stride=keys.stride(1),
        value_head_stride=values.stride(0),
        value_token_stride=values.stride(1),
        tokens=keys.shape[1],
        fresh=int(fresh),
        **shared,
        MASKED=seen is not None,
        LAST=last,
        PRECISION=precision,
        **cut,
    )


def _dense(x: Tensor) -> Tensor:
    """``x`` with its channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tiles(d_tile: int, precision: str, *, amd: bool) -> dict[str, int]:
    """How the kernel is cut and launched, so that neither registers nor shared memory run out.

    Shared memory stays below 99 KB, which consumer cards have, and on AMD within 64 KB.
    """
    wide = d_tile > 128
    if precision == "half":
        rows, tokens, warps, stages = (64, 32, 8, 2) if wide else (128, 64, 8, 2)
        if amd:
            warps, stages = (4, 1) if wide else (8, 1)
    elif precision == "tf32x3":
        rows, tokens, warps, stages = (16, 32, 8, 1) if wide else (32, 32, 4, 1)
    else:
        rows, tokens, warps, stages = (32, 32, 4, 1) if wide else (64, 32, 4, 1)
    return {"ROW_TILE": rows, "TOKEN_TILE": tokens, "num_warps": warps, "num_stages": stages}
