"""Bits: logic, shifts, fields, bytes (PTX ISA 8.7, 9.7.1, 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.decode import Operands, assign, instruction
from ptx_machine.warp import RAW, Array, Step

LOGIC = ("pred", "b16", "b32", "b64")
_FUNCTIONS = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
}  # fmt: skip
U32, U64 = np.uint32, np.uint64


@instruction(*_FUNCTIONS)
def logic(operands: Operands) -> Step:
    bits = {"pred": 1}.get(kind := operands.one_of(*LOGIC)) or int(kind[1:])
    to, *of = operands.done(2 if operands.name == "not" else 3)
    sources = [operands.source(one, bits) for one in of]
    return assign(_FUNCTIONS[operands.name], operands.target(to, bits), *sources)


@instruction("lop3")
def lop3(operands: Operands) -> Step:
    """Any function of three bits: bit ``4 a + 2 b + c`` of a table."""
    operands.one_of("b32")
    to, a, b, c, table = operands.done(5)
    bits = operands.number(table)
    if bits is None or not 0 <= bits < 256:
        raise operands.refuse("a table that is no constant")
    terms = [term for term in range(8) if bits >> term & 1]

    def function(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros_like(x)
        for term in terms:
            result |= (x if term & 4 else ~x) & (y if term & 2 else ~y) & (z if term & 1 else ~z)
        return result

    return assign(function, operands.target(to, 32), *(operands.source(o, 32) for o in (a, b, c)))


@instruction("shl", "shr")
def shift(operands: Operands) -> Step:
    """By 32 bits without a sign; by as many as the type has, or more, nothing but signs is left."""
    left = operands.name == "shl"
    names = [f"{sign}{bits}" for sign in ("b" if left else "bus") for bits in (16, 32, 64)]
    kind = operands.one_of(*names)
    bits = int(kind[1:])
    to, a, b = operands.done(3)
    signed = kind[0] == "s"
    dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    move: Callable[[Array, Array], Array] = np.left_shift if left else np.right_shift
    sources, target = (operands.source(a, bits), operands.source(b, 32)), operands.target(to, bits)
    number = operands.number(b)
    if number is not None:
        clamped = min(number & 0xFFFFFFFF, bits)
        if clamped == bits and not signed:
            return assign(np.zeros_like, target, sources[0])
        by = dtype.type(min(clamped, bits - 1))
        if signed:
            return assign(lambda x: move(x.view(dtype), by).view(RAW[bits]), target, sources[0])
        return assign(lambda x: move(x, by), target, sources[0])

    def function(x: Array, count: Array) -> Array:
        within = np.minimum(count, U32(bits - 1)).astype(dtype)
        moved: Array = move(x.view(dtype), within).view(RAW[bits])
        return moved if signed else np.where(count >= bits, RAW[bits](0), moved)

    return assign(function, target, *sources)


@instruction("shf")
def funnel_shift(operands: Operands) -> Step:
    """32 bits of the pair ``(b, a)``: the upper ones moved left, or the lower ones moved right."""
    left = operands.one_of("l", "r") == "l"
    wrap = operands.one_of("wrap", "clamp") == "wrap"
    operands.one_of("b32")
    to, a, b, c = operands.done(4)

    def function(low: Array, high: Array, count: Array) -> Array:
        by = (count & U32(31) if wrap else np.minimum(count, U32(32))).astype(U64)
        pair = high.astype(U64) << U64(32) | low.astype(U64)
        return ((pair << by) >> U64(32) if left else pair >> by).astype(U32)

    return assign(function, operands.target(to, 32), *(operands.source(o, 32) for o in (a, b, c)))


def _low_ones(count: Array, bits: int) -> Array:
    """Words of as many ones at the low end."""
    raw = RAW[bits]
    ones = (raw(1) << np.minimum(count, bits - 1).astype(raw)) - raw(1)
    return np.where(count >= bits, ~raw(0), ones)


@instruction("bfe")
def extract(operands: Operands) -> Step:
    """A field, extended by its own last bit, or that of the word where the field goes beyond."""
    kind = operands.one_of("u32", "s32", "u64", "s64")
    bits = int(kind[1:])
    to, a, b, c = operands.done(4)
    raw = RAW[bits]
    sources = operands.source(a, bits), operands.source(b, 32), operands.source(c, 32)
    target = operands.target(to, bits)
    start, length = operands.number(b), operands.number(c)
    if start is not None and length is not None and kind[0] == "u":
        start, length = start & 255, length & 255
        if start < bits:
            by, keep = raw(start), raw((1 << min(length, bits)) - 1)
            return assign(lambda x: (x >> by) & keep, target, sources[0])

    def function(x: Array, position: Array, count: Array) -> Array:
        first, size = (position & U32(255)).astype(np.int64), (count & U32(255)).astype(np.int64)
        by: Array = np.minimum(first, bits - 1).astype(raw)
        there = np.clip(bits - first, 0, size)
        keep = _low_ones(there, bits)
        found: Array = np.where(there > 0, x >> by, raw(0)) & keep
        if kind[0] == "u":
            return found
        last = np.clip(first + size - 1, 0, bits - 1).astype(raw)
        negative = (size > 0) & ((x >> last) & raw(1)).astype(np.bool_)
        return np.where(negative, found | ~keep, found)

    return assign(function, target, *sources)


@instruction("bfi")
def insert(operands: Operands) -> Step:
    """The low bits of ``a`` put into ``b``."""
    bits = int(operands.one_of("b32", "b64")[1:])
    to, a, b, c, d = operands.done(5)
    raw = RAW[bits]

    def function(field: Array, into: Array, position: Array, count: Array) -> Array:
        first, size = (position & U32(255)).astype(np.int64), (count & U32(255)).astype(np.int64)
        by: Array = np.minimum(first, bits - 1).astype(raw)
        keep = np.where(first < bits, _low_ones(np.minimum(size, bits), bits) << by, raw(0))
        return (into & ~keep) | ((field << by) & keep)

    sources = [operands.source(a, bits), operands.source(b, bits)]
    sources += [operands.source(c, 32), operands.source(d, 32)]
    return assign(function, operands.target(to, bits), *sources)


@instruction("prmt")
def permute(operands: Operands) -> Step:
    """Four of the eight bytes of ``(b, a)``; bit 3 of a selector repeats its sign instead."""
    operands.one_of("b32")
    to, a, b, c = operands.done(4)
    rows, fixed = np.arange(32)[:, None], operands.number(c)
    nibbles = np.array([0, 4, 8, 12], U32)
    constant = None if fixed is None else (U32(fixed & 0xFFFF) >> nibbles) & U32(15)

    def function(low: Array, high: Array, selector: Array) -> Array:
        pair = high.astype(U64) << U64(32) | low.astype(U64)
        chosen = (selector[:, None] >> nibbles) & U32(15) if constant is None else constant
        pairs = pair.view(np.uint8).reshape(32, 8)
        bytes_ = pairs[rows, chosen & U32(7)] if constant is None else pairs[:, chosen & U32(7)]
        replicate = chosen > 7
        if replicate.any():
            bytes_ = np.where(replicate, np.where(bytes_ > 127, 255, 0), bytes_).astype(np.uint8)
        return np.ascontiguousarray(bytes_).view(U32)[:, 0]

    return assign(function, operands.target(to, 32), *(operands.source(o, 32) for o in (a, b, c)))


def _leading(x: Array) -> Array:
    """Zeros above the highest one."""
    count = np.full(x.shape, x.dtype.itemsize * 8, U32)
    while x.any():
        count = np.where(x != 0, count - U32(1), count)
        x = x >> x.dtype.type(1)
    return count


def _reversed(x: Array) -> Array:
    raw = np.ascontiguousarray(x[:, None]).view(np.uint8)
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    return np.packbits(bits, axis=1, bitorder="big")[:, ::-1].copy().view(x.dtype)[:, 0]


_COUNTS: dict[str, Callable[[Array], Array]] = {
    "popc": lambda x: np.bitwise_count(x).astype(U32),
    "clz": _leading,
    "brev": lambda x: _reversed(x)[::1],
}


@instruction(*_COUNTS)
def count(operands: Operands) -> Step:
    bits = int(operands.one_of("b32", "b64")[1:])
    to, of = operands.done(2)
    result = bits if operands.name == "brev" else 32
    return assign(_COUNTS[operands.name], operands.target(to, result), operands.source(of, bits))
