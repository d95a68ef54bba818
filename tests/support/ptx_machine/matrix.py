"""Matrix instructions of a warp (PTX ISA 8.7, 9.7.14).

A product is summed in f64 and rounded to the accumulator's type once. A device sums in an order of
its own, with a few more bits than f32 in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ptx_machine.decode import Operands, instruction, need_all
from ptx_machine.floats import F32, F64, from_bf16
from ptx_machine.warp import LANES, Array, Mask, Step, Warp

U32 = np.uint32
_GROUP, _THREAD = np.arange(LANES) >> 2, np.arange(LANES) & 3


def _fragment(registers: int, elements: int, *, both: bool) -> tuple[Array, Array]:
    """Row and depth of each element ``[registers, 32 * elements]`` of a factor.

    ``both``: of the first factor, where every second register has rows 8 to 15; the second one's
    "rows" are its columns.
    """
    register = np.arange(registers)[:, None, None]
    element = np.arange(elements)
    rows = _GROUP[:, None] + (8 * (register % 2) if both else 0) + 0 * element
    block = register // 2 if both else register
    depth = elements * _THREAD[:, None] + element + block * 4 * elements
    shape = registers, LANES * elements
    full = registers, LANES, elements
    return np.broadcast_to(rows, full).reshape(shape), np.broadcast_to(depth, full).reshape(shape)


VIEWS: dict[str, Callable[[Array], Array]] = {
    "f16": lambda x: x.view(np.float16),
    "bf16": lambda x: from_bf16(x.view(np.uint16)),
    # The low bits of an f32 are not looked at.
    "tf32": lambda x: (x & U32(0xFFFFE000)).view(F32),
    "s8": lambda x: x.view(np.int8),
    "u8": lambda x: x.view(np.uint8),
}
_ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}
_DEPTHS = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32)}


def _scatter(rows: Array, columns: Array, shape: tuple[int, int]) -> Array:
    """Where each element of a matrix of that shape lies in the registers, flat."""
    place = np.empty(shape, np.int64)
    place[rows, columns] = np.arange(rows.size).reshape(rows.shape)
    return place


def gather(values: Sequence[Array], slots: Sequence[int]) -> Array:
    """Registers ``[n, 32]`` of a warp."""
    found = np.empty((len(slots), LANES), U32)
    for place, slot in enumerate(slots):
        found[place] = values[slot]
    return found


@dataclass(frozen=True)
class Accumulator:
    """Where a matrix of 16 rows lies: by 8 columns, of which a thread has two.

    These are in two registers for rows 0 to 7 and two for the others, halves in one for each.
    """

    kind: str
    columns: int = 8

    @property
    def registers(self) -> int:
        return self.columns // 8 * (2 if self.kind == "f16" else 4)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype({"f16": np.float16, "f32": F32, "s32": np.int32}[self.kind])

    def place(self) -> Array:
        """Where each element lies in the registers, ``[16, columns]``."""
        place = np.empty((16, self.columns), np.int64)
        for block in range(self.columns // 8):
            for half in range(2):
                for element in range(2):
                    rows = _GROUP + 8 * half
                    columns = 8 * block + 2 * _THREAD + element
                    if self.kind == "f16":
                        flat = 2 * (LANES * (2 * block + half) + np.arange(LANES)) + element
                    else:
                        flat = LANES * (4 * block + 2 * half + element) + np.arange(LANES)
                    place[rows, columns] = flat
        return place


def first_factor(registers: int, kind: str, depth: int) -> Array:
    """Where each element ``[16, depth]`` of the first factor lies in its registers."""
    return _scatter(*_fragment(registers, _ELEMENTS[kind], both=True), (16, depth))


@instruction("mma")
def mma(operands: Operands) -> Step:
    """``d = a b + c`` of 16 rows and 8 columns."""
    operands.one_of("sync")
    operands.one_of("aligned")
    shape = operands.one_of("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    operands.one_of("row")
    operands.one_of("col")
    result = operands.one_of("f32", "f16", "s32")
    kinds = operands.one_of(*VIEWS), operands.one_of(*VIEWS)
    if operands.one_of(result) != result or (result == "s32") != (kinds[0] in ("s8", "u8")):
        raise operands.refuse("types")
    depth, elements = int(shape.removeprefix("m16n8k")), _ELEMENTS[kinds[0]]
    if depth not in _DEPTHS[kinds[0]] or (kinds[0] != kinds[1] and result != "s32"):
        raise operands.refuse("shape")
    if result == "f16" and kinds[0] != "f16":
        raise operands.refuse("types")
    d, a, b, c = (operands.vector(one) for one in operands.done(4))
    blocks = depth // (4 * elements)
    kept = Accumulator(result)
    for parts, count in ((d, kept.registers), (a, 2 * blocks), (b, blocks), (c, kept.registers)):
        if len(parts) != count:
            raise operands.refuse(f"expected {count} registers, found {parts}")
    targets = [operands.target(one, 32) for one in d]
    first, second, third = ([operands.source(o, 32) for o in parts] for parts in (a, b, c))
    view_a, view_b = VIEWS[kinds[0]], VIEWS[kinds[1]]
    place_a = first_factor(2 * blocks, kinds[0], depth)
    place_b = np.ascontiguousarray(_scatter(*_fragment(blocks, elements, both=False), (8, depth)).T)
    place_c, dtype = kept.place(), kept.dtype
    back = np.argsort(place_c, axis=None)

    def step(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            need_all(operands, mask)
        R = warp.values
        A = view_a(gather(R, first)).ravel()[place_a].astype(F64)
        B = view_b(gather(R, second)).ravel()[place_b].astype(F64)
        C = gather(R, third).view(dtype).ravel()[place_c].astype(F64)
        D = A @ B + C
        if result == "s32":
            D = D.astype(np.int64)
        rounded = D.astype(dtype).ravel()[back].view(U32)
        for place, target in enumerate(targets):
            R[target] = rounded[LANES * place : LANES * (place + 1)]

    return step
