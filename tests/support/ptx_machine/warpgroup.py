"""Matrix instructions of four warps, ``wgmma`` (PTX ISA 8.7, 9.7.15): sm_90a.

Each warp has 16 of the 64 rows, and does its part alone when it comes to the instruction: that the
product may be made later, up to ``wait_group``, is not seen. Of shared memory a *descriptor* tells
where the second factor lies, and where the first one does if it is not in registers.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from ptx_machine.decode import Operands, instruction, need_all
from ptx_machine.floats import F32, F64
from ptx_machine.matrix import U32, VIEWS, Accumulator, first_factor, gather
from ptx_machine.warp import LANES, Array, Mask, Step, Warp

_SIZES = {"f16": 2, "bf16": 2, "tf32": 4}
_SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}
"""Bits of an address from bit 4 that are changed by those from bit 7, by the descriptor's mode."""


@lru_cache(maxsize=256)
def layout(
    rows: int, depth: int, size: int, swizzle: int, leading: int, stride: int, along_rows: bool
) -> Array:
    """Bytes from the start to each element ``[rows, depth]``, before swizzling.

    Atoms are 8 lines of ``16 * 2**swizzle`` bytes. A line is a row, cut along the depth, or where
    ``along_rows`` a step of the depth, cut along the rows (PTX ISA 8.7, 9.7.15.5.1).
    """
    row, step = np.arange(rows)[:, None], np.arange(depth)
    width = (16 << swizzle) // size
    chunk = 16 // size
    if along_rows:
        if swizzle == 0:
            between, outer = row // chunk * stride, step // 8 * leading
        else:
            between, outer = row // width * leading, step // 8 * stride
        return row % width * size + between + step % 8 * (16 << swizzle) + outer
    line = row % 8 * (16 << swizzle) + row // 8 * stride
    if swizzle == 0:
        return line + step % chunk * size + step // chunk * leading
    return line + step * size


def read_matrix(
    operands: Operands, warp: Warp, descriptor: int, rows: range, depth: int, along_rows: bool,
    kind: str,
) -> Array:  # fmt: skip
    """Rows of a factor in shared memory, f64 ``[rows, depth]``."""
    size, swizzle = _SIZES[kind], _SWIZZLES.get(descriptor >> 62, -1)
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7 or descriptor >> 61 & 1 or swizzle < 0:
        raise operands.refuse(f"descriptor {descriptor:#x}")
    if not along_rows and depth * size > 32:
        raise operands.refuse("depth")
    places = layout(rows.stop, depth, size, swizzle, leading, stride, along_rows)[rows.start :]
    addresses = (places + start).astype(np.uint32)
    addresses ^= (addresses >> U32(3)) & U32(((1 << swizzle) - 1) << 4)
    warp.shared.check(addresses.ravel(), size, operands.instruction)
    found = warp.shared.items(size, 1)[warp.shared.index(addresses, size)]
    return VIEWS[kind](found.astype(U32) if size == 4 else found).reshape(-1, depth).astype(F64)


@instruction("wgmma")
def wgmma(operands: Operands) -> Step:
    if operands.modifiers[0] in ("fence", "commit_group", "wait_group"):
        name = operands.modifiers.pop(0)
        operands.one_of("sync")
        operands.one_of("aligned")
        operands.done(1 if name == "wait_group" else 0)

        def nothing(warp: Warp, mask: Mask) -> None:
            need_all(operands, mask)

        return nothing
    return _multiply(operands)


def _multiply(operands: Operands) -> Step:
    """``d = a b + d``, or ``d = a b``; either factor may be negated."""
    for modifier in ("mma_async", "sync", "aligned"):
        operands.one_of(modifier)
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", operands.modifiers.pop(0))
    operands.one_of("f32")
    kind = operands.one_of(*_SIZES)
    operands.one_of(kind)
    size = _SIZES[kind]
    if shape is None or int(shape[2]) * size != 32 or int(shape[1]) % 8:
        raise operands.refuse("shape")
    columns, depth = int(shape[1]), int(shape[2])
    in_registers = operands.operands[1].startswith("{")
    turns = 0 if size == 4 else 1 if in_registers else 2
    d, a, b, scale, *signs = operands.done(6 + turns)
    numbers = [operands.number(one) for one in signs]
    if any(one not in (1, -1) for one in numbers[:2]) or any(o not in (0, 1) for o in numbers[2:]):
        raise operands.refuse("signs")
    sign = float((numbers[0] or 1) * (numbers[1] or 1))
    turned_b = turns > 0 and numbers[-1] == 1
    turned_a = turns == 2 and numbers[2] == 1
    targets = [operands.target(one, 32) for one in operands.vector(d)]
    if len(targets) != columns // 2:
        raise operands.refuse(f"expected {columns // 2} registers")
    adds, second = operands.source(scale, 1), operands.source(b, 64)
    first = [operands.source(o, 32 if in_registers else 64) for o in operands.vector(a)]
    if in_registers and len(first) != 4:
        raise operands.refuse("expected 4 registers")
    place_a, view = first_factor(4, kind, depth), VIEWS[kind]
    place_d = Accumulator("f32", columns).place()
    back = np.argsort(place_d, axis=None)
    warp_number = operands.slots.special("%warpid")

    def step(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            need_all(operands, mask)
        R = warp.values
        if in_registers:
            A = view(gather(R, first)).ravel()[place_a].astype(F64)
        else:
            top = 16 * (int(R[warp_number][0]) % 4)
            where = int(R[first[0]][0])
            A = read_matrix(operands, warp, where, range(top, top + 16), depth, turned_a, kind)
        B = read_matrix(operands, warp, int(R[second][0]), range(columns), depth, turned_b, kind)
        D = sign * (A @ B.T)
        if R[adds][0]:
            D += gather(R, targets).view(F32).ravel()[place_d]
        rounded = D.astype(F32).ravel()[back].view(U32)
        for place, target in enumerate(targets):
            R[target] = rounded[LANES * place : LANES * (place + 1)]

    return step
