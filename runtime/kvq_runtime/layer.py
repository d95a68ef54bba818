"""A cache layer of transformers that is made of packed pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import CacheFullError, KVQError
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.packed_rows import table_entry
from kvq_runtime.decode_step import StepForward
from kvq_runtime.exact_tokens import ExactBuffers, Tokens, reordered
from kvq_runtime.forward import Forward, Rule
from kvq_runtime.implementation import ImplementationName
from kvq_runtime.layer_attention import Reading, attend_rows
from kvq_runtime.layer_step import put_token
from kvq_runtime.modes import lasting_tensors, plain_arithmetic
from kvq_runtime.page_codec import PageCodec
from kvq_runtime.page_pool import PagePool
from kvq_runtime.rows import Row

ENCODED_BLOCK_BYTES = 2**20
"""Keys in f32 that are encoded at a time."""

ENCODING_COPIES = 24
"""What encoding holds at its worst moment, in units of the keys in f32; measured."""


@dataclass(frozen=True)
class PackedStates:
    """What ``update`` returns in place of keys and of values; only kvq's attention can read it.

    Fields:
        layer: the layer that holds them.
        shape: ``[B, H, S, D]`` as a stock layer would return it, padding included.
        fed: the keys or values of this forward as they came in.
    """

    layer: PackedLayer
    shape: tuple[int, ...]
    fed: Tensor


class PackedLayer(CacheLayerMixin):
    """Keys before RoPE and values of one layer: sinks, packed pages, and a tail of exact tokens.

    Tensors, all allocated once:
        ``pool``: pages, in slabs; ``block_table`` i32 ``[B, max_pages]``: their ids;
        ``exact``: sinks, then the tail, which is packed page by page when it is full.
    Padding is never stored, so that a row's pages do not depend on its batch.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, codec: PageCodec, *, capacity: int | None = None) -> None:
        """``capacity``: slots a row; allocated at once, and more is refused. None grows."""
        super().__init__()
        self.codec = codec
        self.capacity = capacity
        self.forward: Forward | None = None
        self.impl: ImplementationName = "reference"
        self.slots = 0
        self.torn = False
        self.known_codec: PageCodec | None = None
        self.rows: list[Row] = []
        self._readings: list[Reading] = []

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes, dtype and device of the first ``[B, H, T, D]``."""
        self.allocate(key_states.shape[0], dtype=key_states.dtype, device=key_states.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store ``[B, H, T, D]`` of the running forward; return what attention reads them by.

        Raises KVQError outside of ``kvq.attach``, CacheFullError beyond the capacity.
        """
        if self.forward is None or not self.forward.active:
            raise KVQError(
                "a packed cache is used outside of the `with kvq.attach(...)` that reads it.",
                hint="run the model inside `with kvq.attach(model, sidecar):`",
            )
        rotary = self.codec.rotary
        self.forward.check_key(key_states, rotary.channels)
        stored = rotary.ordered(key_states)
        if isinstance(self.forward, StepForward):
            put_token(self, stored, value_states, self.forward)
        else:
            self.append(stored, value_states, forward=self.forward)
        shape = (*key_states.shape[:2], self.slots, key_states.shape[-1])
        return PackedStates(self, shape, key_states), PackedStates(self, shape, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``query_length`` more queries has."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Slots that were fed, padding included."""
        return self.slots

    def get_max_length(self) -> int:
        """Slots that there is room for; -1 without a limit."""
        return -1 if self.capacity is None else self.capacity

    def reset(self) -> None:
        """Forget all tokens; slabs stay allocated. Mends what a failed forward left."""
        if self.is_initialized:
            self.pool.clear()
        self.rows = [Row() for _ in self.rows]
        self.slots = 0
        self.torn = False
        self.end_reading()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` slots of every row; a count > 0 is what to keep.

        A page that is cut keeps its codes and gets a smaller length: decoded numbers are never
        encoded again. It takes a whole page of memory from then on, however few tokens are left.
        """
        kept = tokens_to_remove if tokens_to_remove > 0 else self.slots + tokens_to_remove
        kept = max(0, kept)
        if kept >= self.slots:
            return
        for place, row in enumerate(self.rows):
            self.pool.release(row.crop(kept))
            self._write_table(place, max(0, len(row.pages) - 1))
        self.slots = kept
        self.end_reading()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers, or a mask of booleans)."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; the copies name the same pages."""
        self._select([row for row in range(len(self.rows)) for _ in range(repeats)])

    def offload(self) -> None:
        """Refused: packed layers stay where they are."""
        raise KVQError(
            "a packed cache cannot be offloaded.", hint='leave cache_implementation="offloaded" out'
        )

    def prefetch(self) -> None:
        """Refused as ``offload``."""
        self.offload()

    # Storage.

    def allocate(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """Allocate for ``batch_size`` rows; on the ``meta`` device only to count bytes."""
        self.batch_size = batch_size
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type != "meta":
            self.codec = self.codec.to(self.device)
        self.pool = PagePool(self.codec, device=self.device, has_capacity=self.capacity is not None)
        pages = self._pages_at_capacity()
        self.pool.reserve(batch_size * pages)
        with lasting_tensors():
            self.block_table = torch.zeros(batch_size, pages, dtype=torch.int32, device=device)
        self.exact = ExactBuffers(
            batch_size,
            self.codec.sink_tokens + self.window,
            num_kv_heads=self.codec.num_kv_heads,
            head_dim=self.codec.head_dim,
            dtype=dtype,
            device=self.device,
        )
        self.rows = [Row() for _ in range(batch_size)]
        self.is_initialized = True

    @property
    def window(self) -> int:
        """Tokens that the tail holds at most: the recent ones and one page."""
        return self.codec.recent_tokens + PAGE_TOKENS

    @property
    def allocated_bytes(self) -> int:
        """Bytes of every tensor that the layer has allocated for its rows."""
        if not self.is_initialized:
            return 0
        return self.pool.allocated_bytes + self.exact.nbytes + self.block_table.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes without pages that are allocated and not in use."""
        if not self.is_initialized:
            return 0
        free = self.pool.num_pages - self.pool.used_pages
        return self.allocated_bytes - free * self.pool.page_bytes

    def append(
        self, key_states: Tensor, value_states: Tensor, *, forward: Forward | None = None
    ) -> None:
        """Store the keys (before RoPE, in rotary channel order) and values of T more slots.

        Args:
            key_states, value_states: ``[B, H, T, D]``.
            forward: which tokens are attended, and their positions; without it all are, and
                positions go on from the slots.

        Raises CacheFullError beyond the capacity, KVQError for another number of rows. Where
        anything else fails the layer is ``torn`` until it is reset.
        """
        B, _, T, _ = key_states.shape
        self._make_room(B, key_states)
        self.check_room(T)
        if forward is None:
            forward = Forward.consecutive(self.slots, B, T, device=self.device)
        forward = forward.on(self.device)
        self.impl = forward.impl
        # Freed before anything is written: the tokens of the last forward may be large.
        self.end_reading()
        self.torn = True
        with plain_arithmetic(self.device):
            self._readings = [
                self._append_row(place, Tokens(*fed), forward)
                for place, fed in enumerate(
                    zip(key_states.detach(), value_states.detach(), forward.positions, strict=True)
                )
            ]
        self.slots += T
        self.torn = False

    def check_room(self, T: int) -> None:
        """Raise CacheFullError if T more slots are too many."""
        if self.capacity is not None and self.slots + T > self.capacity:
            raise CacheFullError(
                f"the cache has room for {self.capacity:,} tokens a row; {self.slots:,} are used "
                f"and {T:,} more came.",
                hint="a larger capacity (--context), or a new cache",
            )

    def _make_room(self, B: int, like: Tensor) -> None:
        """Allocate for B rows where nothing is held yet; refuse another number where it is."""
        if not self.is_initialized or (
            len(self.rows) != B and self.slots == 0 and self.capacity is None
        ):
            self.allocate(B, dtype=like.dtype, device=like.device)
        if len(self.rows) == B:
            return
        hint = "start with a new cache, or call cache.reset()"
        if self.capacity is not None:
            hint = f"PackedCache(..., batch_size={B}): rows of a batch and of beams count"
        raise KVQError(f"the cache holds {len(self.rows)} rows and got {B}.", hint=hint)

    def attend(self, query: Tensor, options: AttentionOptions, *, rule: Rule) -> Tensor:
        """Attention of the queries of the last update, ``[B, T, HQ, D]``, in f32 or f64.

        ``query`` is ``[B, HQ, T, D]``, rotated, in rotary channel order. Padding gives 0.
        """
        try:
            with plain_arithmetic(self.device):
                return attend_rows(self, self._readings, query.detach(), options, rule=rule)
        finally:
            self.end_reading()

    def end_reading(self) -> None:
        """Let go of the last update's tokens, which are kept exactly for the attention to come."""
        self._readings = []

    def _append_row(self, place: int, fed: Tokens, forward: Forward) -> Reading:
        """Store one row's T tokens, padding among them, and pack the pages that they complete."""
        row, attended = self.rows[place], forward.attended[place]
        if attended is not None:
            fed = fed.at(attended)
        for start, stop in forward.runs[place]:
            row.attend(self.slots + start, self.slots + stop)
        S, new, index = self.codec.sink_tokens, fed.length, row.tokens
        row.positions.extend(index, forward.position_runs(place))
        if new == 1 and row.tail == self.window:
            # The one query that comes reads this page from its codes already.
            self.pack_first(place)
        held = len(row.pages)
        # Sinks fill the first places, and only when they are full does the tail begin.
        used = row.sinks + row.tail
        if used + new <= S + self.window:
            self.exact.write(place, used, fed)
            row.sinks = min(S, used + new)
            row.tail = used + new - row.sinks
            exact = self.exact.read(place, 0, used + new)
            return Reading(attended, index, held, exact, row.sinks, row.tail_start)
        exact = self.exact.read(place, 0, used).followed_by(fed)
        row.sinks = S
        row.tail = used + new - S
        reading = Reading(attended, index, held, exact, S, row.tail_start)
        self.exact.write(place, 0, exact.at(slice(0, S)))
        complete = -(-(row.tail - self.window) // PAGE_TOKENS)
        self._pack(place, exact.at(slice(S, None)), complete)
        return reading

    def pack_first(self, place: int) -> None:
        """Pack the first page of a row's tail."""
        S = self.codec.sink_tokens
        self._pack(place, self.exact.read(place, S, S + self.rows[place].tail), 1)

    def _pack(self, place: int, tail: Tokens, count: int) -> None:
        """Pack the first ``count`` pages of a row's tail; what is left becomes the tail."""
        row = self.rows[place]
        pages = self.pool.take(count)
        H, _, D = tail.keys.shape
        # Kernels have blocks of their own.
        step = count
        if self.impl == "reference":
            step = max(1, ENCODED_BLOCK_BYTES // (4 * H * PAGE_TOKENS * D))
        for first in range(0, count, step):
            some = pages[first : first + step]
            span = slice(first * PAGE_TOKENS, (first + len(some)) * PAGE_TOKENS)
            starts = range(row.tail_start + span.start, row.tail_start + span.stop, PAGE_TOKENS)
            regular = [row.positions.are_consecutive(start, PAGE_TOKENS) for start in starts]
            self.pool.write(some, *tail.at(span), regular=regular, impl=self.impl)
        old = len(row.pages)
        row.tail -= count * PAGE_TOKENS
        row.add_pages(pages)
        self._write_table(place, old)
        self.exact.write(place, self.codec.sink_tokens, tail.at(slice(count * PAGE_TOKENS, None)))

    def _pages_at_capacity(self) -> int:
        """Pages of a row that is full: those that no later token could still read exactly."""
        if self.capacity is None:
            return 0
        paged = self.capacity - self.codec.sink_tokens - self.codec.recent_tokens - 1
        return max(0, paged // PAGE_TOKENS)

    def _write_table(self, place: int, first: int) -> None:
        """Bring the block table of a row up to date from its page ``first`` on."""
        row = self.rows[place]
        count, room = len(row.pages), self.block_table.shape[1]
        if count > room:
            more = max(count, 2 * room) - room
            with lasting_tensors():
                self.block_table = torch.nn.functional.pad(self.block_table, (0, more))
        entries = [
            table_entry(page, length)
            for page, length in zip(row.pages[first:], row.lengths[first:], strict=True)
        ]
        if len(entries) == 1:
            # A number is part of the launch: nothing is uploaded, and so nothing waited for.
            self.block_table[place, first].fill_(entries[0])
            return
        written = torch.tensor(entries, dtype=torch.int32)
        self.block_table[place, first:count].copy_(written, non_blocking=True)

    def _drop_rows(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.pool.release(row.pages)

    def _select(self, indices: Sequence[int]) -> None:
        if not self.is_initialized:
            return
        chosen = [self.rows[index].copy() for index in indices]
        for row in chosen:
            self.pool.share(row.pages)
        self._drop_rows(self.rows)
        self.rows = chosen
        order = torch.tensor(indices, dtype=torch.int64, device=self.device)
        self.exact.select(order)
        self.block_table = reordered(self.block_table, order)
        self.batch_size = len(chosen)
        self.end_reading()
