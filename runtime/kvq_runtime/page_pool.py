"""Storage of pages: slabs that are never copied, and who uses which page."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.implementation import ImplementationName
from kvq_runtime.modes import lasting_tensors
from kvq_runtime.page_codec import PageCodec

SMALLEST_SLAB = 8
"""Pages of the first slab where no capacity is known."""


@dataclass(frozen=True)
class Slab:
    """Pages ``first`` to ``first + count - 1`` of a pool, allocated at once."""

    first: int
    count: int
    key: Any
    value: Any


class PagePool:
    """Pages of one layer, shared by the rows of its batch.

    A page is final once it is written, so that rows may share it: it is free again when no row
    names it any more. Slabs are allocated once and keep their address; each new one is half as
    large as all before together, so that their number grows with the logarithm of the context.

    A page whose positions jump is *irregular*: its base position is ``-1 - i``, and its positions
    are line i of ``irregular_positions``, i32 ``[I, 256]``.
    """

    def __init__(
        self, codec: PageCodec, *, device: torch.device | str, has_capacity: bool = False
    ) -> None:
        """``has_capacity``: it is reserved for all that will come, and grows by what it must."""
        self.codec = codec
        self.has_capacity = has_capacity
        self.device = device
        self.slabs: list[Slab] = []
        self.irregular: dict[int, int] = {}
        with lasting_tensors():
            self.irregular_positions = torch.empty(0, PAGE_TOKENS, dtype=torch.int32, device=device)
        self._users: list[int] = []
        self._free: list[int] = []
        self._free_lines: list[int] = []

    @property
    def num_pages(self) -> int:
        """Pages that are allocated."""
        return len(self._users)

    @property
    def used_pages(self) -> int:
        """Pages that some row names."""
        return len(self._users) - len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all heads."""
        key, value = self.codec.allocate(1, device="meta")
        return _bytes(key) + _bytes(value)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slabs and of the positions of irregular pages."""
        held = sum(_bytes(slab.key) + _bytes(slab.value) for slab in self.slabs)
        return held + self.irregular_positions.nbytes

    def reserve(self, num_pages: int) -> None:
        """Allocate so that the pool has at least ``num_pages`` pages."""
        missing = num_pages - self.num_pages
        if missing > 0:
            self._add_slab(missing)

    def take(self, count: int) -> list[int]:
        """Ids of ``count`` free pages, one user each."""
        missing = count - len(self._free)
        if missing > 0:
            ahead = 0 if self.has_capacity else max(SMALLEST_SLAB, self.num_pages // 2)
            self._add_slab(max(missing, ahead))
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Count one more user of each page."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one user less; a page without users is free."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                heapq.heappush(self._free, page)
                if (line := self.irregular.pop(page, None)) is not None:
                    self._free_lines.append(line)

    def write(
        self,
        pages: Sequence[int],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        *,
        regular: Sequence[bool],
        impl: ImplementationName = "reference",
    ) -> None:
        """Encode and store complete pages.

        Args:
            pages: ids, P of them.
            keys, values: ``[H, P * 256, D]``.
            positions: i32 ``[P * 256]``.
            regular: of each page, whether its positions are consecutive, which the caller knows
                without waiting for the device.
            impl: of encoding; the bytes are the same.
        """
        key, value = self.codec.encode(keys, values, impl=impl)
        placed = positions.reshape(-1, PAGE_TOKENS)
        key.base_positions.copy_(placed[:, 0])
        for place, is_regular in enumerate(regular):
            if not is_regular:
                line = self._irregular_line(pages[place])
                self.irregular_positions[line] = placed[place]
                key.base_positions[place] = -1 - line
        for slab, inside, places in self._in_slabs(pages):
            for stored, written in ((slab.key, key), (slab.value, value)):
                for field in fields(stored):
                    target, source = getattr(stored, field.name), getattr(written, field.name)
                    _writable(target)[inside] = _writable(source[places])

    def read(self, pages: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        """Key and value pages in the order of ``pages``: views where they lie side by side."""
        for slab, inside, _ in self._in_slabs(pages):
            yield tuple(
                type(stored)(*(getattr(stored, field.name)[inside] for field in fields(stored)))
                for stored in (slab.key, slab.value)
            )

    def positions_of(self, page: int) -> Tensor | None:
        """Positions i32 ``[256]`` of an irregular page; None for a regular one."""
        line = self.irregular.get(page)
        return None if line is None else self.irregular_positions[line]

    def whole(self) -> tuple[Any, Any]:
        """Key and value pages of the pool in one piece, as kernels read them.

        Where there are several slabs they become one: a copy beside the old ones. A pool that was
        reserved for its capacity needs that only where pages were cut, each of which stays a whole
        page.
        """
        if len(self.slabs) != 1:
            with lasting_tensors():
                key, value = self.codec.allocate(self.num_pages, device=self.device)
            whole = Slab(0, self.num_pages, key, value)
            for slab in self.slabs:
                for stored, written in ((key, slab.key), (value, slab.value)):
                    for field in fields(stored):
                        target, source = getattr(stored, field.name), getattr(written, field.name)
                        target[slab.first : slab.first + slab.count].copy_(source)
            self.slabs = [whole]
        return self.slabs[0].key, self.slabs[0].value

    def clear(self) -> None:
        """Free every page, whoever uses it; slabs stay allocated."""
        self._users = [0] * len(self._users)
        self._free = list(range(len(self._users)))
        self.irregular.clear()
        self._free_lines = list(range(len(self.irregular_positions)))

    def _irregular_line(self, page: int) -> int:
        """A line of ``irregular_positions`` that is free, for ``page``."""
        if not self._free_lines:
            room = len(self.irregular_positions)
            with lasting_tensors():
                more = self.irregular_positions.new_empty(max(1, room), PAGE_TOKENS)
                self.irregular_positions = torch.cat([self.irregular_positions, more])
            self._free_lines += range(room, len(self.irregular_positions))
        self.irregular[page] = self._free_lines.pop(0)
        return self.irregular[page]

    def _add_slab(self, count: int) -> None:
        first = self.num_pages
        with lasting_tensors():
            key, value = self.codec.allocate(count, device=self.device)
        self.slabs.append(Slab(first, count, key, value))
        self._users += [0] * count
        # Ids grow, so that appending them keeps the heap a heap.
        self._free += range(first, first + count)
        heapq.heapify(self._free)

    def _in_slabs(self, pages: Sequence[int]) -> Iterator[tuple[Slab, slice | list[int], slice]]:
        """Runs of ``pages`` that lie in one slab: slab, places inside, places in ``pages``."""
        start = 0
        while start < len(pages):
            slab = self._slab_of(pages[start])
            stop = start + 1
            while stop < len(pages) and 0 <= pages[stop] - slab.first < slab.count:
                stop += 1
            inside = [page - slab.first for page in pages[start:stop]]
            straight = inside[-1] - inside[0] == len(inside) - 1 and inside == sorted(inside)
            places = slice(inside[0], inside[-1] + 1) if straight else inside
            yield slab, places, slice(start, stop)
            start = stop

    def _slab_of(self, page: int) -> Slab:
        return next(slab for slab in self.slabs if page - slab.first < slab.count)


def _writable(tensor: Tensor) -> Tensor:
    # torch knows no indexed writes of u16.
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor


def _bytes(pages: Any) -> int:
    return sum(getattr(pages, field.name).nbytes for field in fields(pages))
