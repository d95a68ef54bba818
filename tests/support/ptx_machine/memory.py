"""Memory: the bytes of torch tensors at their own addresses, and shared memory.

Every access is checked: it must lie in one of the tensors, and be aligned to its size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ptx_machine.race import Shadow

Array = np.ndarray[Any, np.dtype[Any]]
_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ALIGNMENT = 16


class MemoryAccessError(RuntimeError):
    """An access outside of all tensors, a misaligned one, or a store to what is only read."""


class Region:
    """A range of bytes.

    Args:
        name: for messages.
        address: of its first byte, as programs see it.
        size: bytes.
        place: address of its first byte in this process; must have the alignment of ``address``.
        owner: what keeps the bytes alive.
        writable: whether programs may store there.
        replicas: whether several threads may store to one place.
    """

    def __init__(
        self, name: str, address: int, size: int, place: int, owner: Any, *,
        writable: bool = True, replicas: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.address, self.size, self.owner = name, address, size, owner
        self.writable, self.replicas = writable, replicas
        # Elements are found by index from a multiple of the largest access on.
        before = address % _ALIGNMENT
        assert place % _ALIGNMENT == before
        self.origin = address - before
        length = -(-(before + size) // _ALIGNMENT) * _ALIGNMENT
        raw = (ctypes.c_uint8 * length).from_address(place - before)
        self._bytes: Array = np.ctypeslib.as_array(raw)
        self._views: dict[tuple[int, int], Array] = {}
        self._shadow: Shadow | None = None

    def __str__(self) -> str:
        return f"{self.name} at {self.address:#x} to {self.address + self.size:#x}"

    @property
    def shadow(self) -> Shadow:
        """Who touched each byte, from ``origin`` on."""
        if self._shadow is None:
            self._shadow = Shadow(str(self), len(self._bytes), replicas=self.replicas)
        return self._shadow

    def items(self, item: int, count: int) -> Array:
        """The bytes as ``[n]`` or ``[n, count]`` unsigned integers of ``item`` bytes."""
        if (item, count) not in self._views:
            view = self._bytes.view(_ITEMS[item])
            self._views[item, count] = view if count == 1 else view.reshape(-1, count)
        return self._views[item, count]

    def holds(self, addresses: Array, size: int) -> bool:
        """Whether all accesses of ``size`` bytes lie inside. Addresses below wrap to far above."""
        if size > self.size:
            return False
        limit = addresses.dtype.type(self.size - size)
        return not np.count_nonzero(addresses - addresses.dtype.type(self.address) > limit)

    def index(self, addresses: Array, size: int) -> Array:
        """Where ``items`` of ``size`` bytes in all has the elements at these addresses."""
        # Signed, as numpy's own indices are.
        offsets = addresses - addresses.dtype.type(self.origin)
        return offsets.astype(np.int64) >> (size.bit_length() - 1)

    def load(self, addresses: Array, item: int, count: int) -> Array:
        """Elements ``[n]`` or ``[count, n]``, contiguous. The addresses have been checked."""
        found = self.items(item, count)[self.index(addresses, item * count)]
        return found if count == 1 else found.T.copy()

    def store(self, addresses: Array, item: int, values: Sequence[Array], backward: bool) -> None:
        """Store elements ``[n]`` each. Of several to one place the last one stays, or the first."""
        count = len(values)
        index = self.index(addresses, item * count)
        kept = values[0] if count == 1 else np.stack(values, axis=1)
        kept = kept.astype(_ITEMS[item], copy=False)
        if backward:
            index, kept = index[::-1], kept[::-1]
        self.items(item, count)[index] = kept

    def check(self, addresses: Array, size: int, what: object) -> None:
        """Check that accesses of ``size`` bytes lie inside and are aligned.

        Raises:
            MemoryAccessError: One is not.
        """
        if not self.holds(addresses, size):
            raise MemoryAccessError(_outside(addresses, size, [self], what))
        check_alignment(addresses, size, what)


def check_alignment(addresses: Array, size: int, what: object) -> None:
    """Check that addresses are multiples of the bytes that are moved (PTX ISA 8.7, 6.4.1)."""
    wrong = addresses & addresses.dtype.type(size - 1)
    if np.count_nonzero(wrong):
        first = int(addresses[np.flatnonzero(wrong)[0]])
        raise MemoryAccessError(f"{first:#x} is no multiple of {size} bytes: {what}")


def _outside(addresses: Array, size: int, regions: Sequence[Region], what: object) -> str:
    bad = next(
        int(one)
        for one in addresses
        if not any(r.holds(np.array([one], np.uint64), size) for r in regions)
    )

    def distance(region: Region) -> int:
        return max(region.address - bad, bad + size - (region.address + region.size))

    nearest = min(regions, key=distance, default=None)
    return f"{size} bytes at {bad:#x} are in no tensor; nearest is {nearest}: {what}"


class GlobalMemory:
    """Tensors on the CPU, and constant data.

    Raises:
        ValueError: A tensor is not on the CPU.
    """

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._last: dict[int, Region] = {}

    def add_tensor(self, name: str, tensor: Tensor, *, writable: bool = True) -> int:
        """Let programs touch a tensor from its first to its last element; return its address."""
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}")
        address = int(tensor.data_ptr())
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            elements = 1 + sum((length - 1) * stride for length, stride in steps)
            size = elements * tensor.element_size()
            region = Region(name, address, size, address, tensor, writable=writable)
            self.regions.append(region)
        return address

    def add_data(self, name: str, data: bytes) -> int:
        """Let programs read constant data; return its address."""
        room = np.zeros(len(data) + _ALIGNMENT, np.uint8)
        place = -(-room.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        start = place - room.ctypes.data
        room[start : start + len(data)] = np.frombuffer(data, np.uint8)
        self.regions.append(Region(name, place, len(data), place, room, writable=False))
        return place

    def regions_of(
        self, addresses: Array, size: int, what: object, *, store: bool
    ) -> list[tuple[Region, Array | slice]]:
        """Where accesses of ``size`` bytes lie: regions, and which of the addresses are theirs.

        Raises:
            MemoryAccessError: One lies in none, is misaligned, or stores to what is only read.
        """
        last = self._last.get(id(what))
        if last is None or not last.holds(addresses, size):
            check = [region for region in self.regions if region.holds(addresses, size)]
            # Tensors may overlap; one of them may be writable.
            last = next((r for r in check if r.writable or not store), check[0] if check else None)
        check_alignment(addresses, size, what)
        if last is not None:
            if store and not last.writable:
                raise MemoryAccessError(f"store to {last}, which is only read: {what}")
            self._last[id(what)] = last
            return [(last, slice(None))]
        if len(addresses) == 1:
            raise MemoryAccessError(_outside(addresses, size, self.regions, what))
        # Rare: threads in several tensors.
        found: list[tuple[Region, Array | slice]] = []
        for place in range(len(addresses)):
            one = slice(place, place + 1)
            for region, _ in self.regions_of(addresses[one], size, what, store=store):
                found.append((region, one))
        return found


def shared_memory(size: int, address: int) -> Region:
    """Shared memory of a program, full of ones: NaN as a float of any width."""
    room = np.full(size + 2 * _ALIGNMENT, 0xFF, np.uint8)
    place = -(-room.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    return Region("shared memory", address, size, place, room, replicas=True)
