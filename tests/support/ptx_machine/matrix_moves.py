"""Matrices of 8 x 8 halves from and to shared memory (PTX ISA 8.7, 9.7.14.5.15 and further)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.decode import Operands, instruction, need_all
from ptx_machine.matrix import U32, gather
from ptx_machine.warp import LANES, Array, Mask, Step, Warp, note


def _matrices(operands: Operands) -> tuple[int, bool]:
    """Number of 8 x 8 matrices, and whether they are transposed."""
    operands.one_of("sync")
    operands.one_of("aligned")
    operands.one_of("m8n8")
    count = int(operands.one_of("x1", "x2", "x4")[1:])
    transposed = operands.flag("trans")
    operands.one_of("shared", "shared::cta")
    operands.one_of("b16")
    return count, transposed


def _row_addresses(operands: Operands, text: str, count: int) -> Callable[[Warp], Array]:
    """What gives the checked addresses of ``8 * count`` rows of 16 bytes, of threads in order."""
    base, offset = operands.address(text)
    found = operands.find(base)
    source = operands.source(base, found[1] if found else 32)

    def addresses(warp: Warp) -> Array:
        found = warp.values[source][: 8 * count]
        found = found + found.dtype.type(offset) if offset else found
        warp.shared.check(found, 16, operands.instruction)
        return found

    return addresses


def _transpose(rows: Array) -> Array:
    """u32 ``[n, 8, 4]`` as matrices of halves, transposed."""
    halves = rows.view(np.uint16).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(U32)


@instruction("ldmatrix")
def ldmatrix(operands: Operands) -> Step:
    """Thread ``4 r + c`` gets halves ``2 c`` and ``2 c + 1`` of row ``r`` of each matrix."""
    count, transposed = _matrices(operands)
    to, of = operands.done(2)
    targets = [operands.target(one, 32) for one in operands.vector(to)]
    if len(targets) != count:
        raise operands.refuse(f"expected {count} registers")
    addresses = _row_addresses(operands, of, count)

    def step(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            need_all(operands, mask)
        place = addresses(warp)
        note(warp, warp.shared, place, 16, None, operands.instruction, store=False)
        rows = warp.shared.items(4, 4)[warp.shared.index(place, 16)].reshape(count, 8, 4)
        if transposed:
            rows = _transpose(rows)
        for target, matrix in zip(targets, rows, strict=True):
            warp.values[target] = matrix.reshape(LANES)

    return step


@instruction("stmatrix")
def stmatrix(operands: Operands) -> Step:
    """``ldmatrix`` the other way."""
    count, transposed = _matrices(operands)
    to, of = operands.done(2)
    sources = [operands.source(one, 32) for one in operands.vector(of)]
    if len(sources) != count:
        raise operands.refuse(f"expected {count} registers")
    addresses = _row_addresses(operands, to, count)

    def step(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            need_all(operands, mask)
        place = addresses(warp)
        note(warp, warp.shared, place, 16, None, operands.instruction, store=True)
        rows = gather(warp.values, sources).reshape(count, 8, 4)
        if transposed:
            rows = _transpose(rows)
        flat = rows.reshape(-1, 4)
        warp.shared.store(place, 4, [flat[:, column] for column in range(4)], warp.backward)

    return step


@instruction("movmatrix")
def movmatrix(operands: Operands) -> Step:
    """A matrix of halves, transposed, in registers."""
    for modifier in ("sync", "aligned", "m8n8", "trans", "b16"):
        operands.one_of(modifier)
    to, of = operands.done(2)
    target, source = operands.target(to, 32), operands.source(of, 32)

    def step(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            need_all(operands, mask)
        rows = warp.values[source].reshape(1, 8, 4)
        warp.values[target] = _transpose(rows).reshape(LANES)

    return step
