"""Arithmetic of integers (PTX ISA 8.7, 9.7.1), and names that floats share with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine import float_arithmetic
from ptx_machine.decode import Operands, assign, instruction
from ptx_machine.syntax import BITS
from ptx_machine.warp import RAW, Array, Step

INTEGERS = {f"{sign}{bits}": np.dtype(f"{code}{bits // 8}")
            for sign, code in (("s", "i"), ("u", "u")) for bits in (16, 32, 64)}  # fmt: skip
WIDER = {16: 32, 32: 64}
Values = Callable[..., Array]


def _integers(operands: Operands, kind: str, function: Values, sources: int) -> Step:
    """A step of a function of integers; its result is cut to the type."""
    bits, dtype = BITS[kind], INTEGERS[kind]
    to, *of = operands.done(1 + sources)
    places = [operands.source(one, bits) for one in of]
    raw = RAW[bits]

    def result(*values: Array) -> Array:
        return function(*(value.view(dtype) for value in values)).astype(dtype).view(raw)

    return assign(result, operands.target(to, bits), *places)


@instruction("add", "sub")
def add(operands: Operands) -> Step:
    if float_arithmetic.is_float(operands):
        return float_arithmetic.binary(operands)
    bits = BITS[operands.one_of(*INTEGERS)]
    to, a, b = operands.done(3)
    # The same bits with a sign and without
    function = np.add if operands.name == "add" else np.subtract
    sources = operands.source(a, bits), operands.source(b, bits)
    return assign(function, operands.target(to, bits), *sources)


def _high(a: Array, b: Array) -> Array:
    """Upper half of a product of 64 bits, signed or not; u64 bits."""
    x, y = a.view(np.uint64), b.view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high -= np.where(a < 0, y, np.uint64(0)) + np.where(b < 0, x, np.uint64(0))
    return high


@instruction("mul", "mad")
def multiply(operands: Operands) -> Step:
    """Low or high half of a product, or all of it; and a sum."""
    if float_arithmetic.is_float(operands):
        return (
            float_arithmetic.binary(operands)
            if operands.name == "mul"
            else float_arithmetic.fma(operands)
        )
    part = operands.one_of("lo", "hi", "wide")
    kind = operands.one_of(*INTEGERS)
    bits, dtype = BITS[kind], INTEGERS[kind]
    if part == "wide" and bits == 64:
        raise operands.refuse("128 bits")
    to, *of = operands.done(4 if operands.name == "mad" else 3)
    wide = WIDER.get(bits, 64)
    result = wide if part == "wide" else bits
    wide_type, raw = np.dtype(f"{dtype.kind}{wide // 8}"), RAW[result]
    shift = wide_type.type(bits % 64)

    def low(a: Array, b: Array) -> Array:
        return a * b

    def whole(a: Array, b: Array) -> Array:
        return (a.view(dtype).astype(wide_type) * b.view(dtype).astype(wide_type)).view(raw)

    def high(a: Array, b: Array) -> Array:
        if bits == 64:
            return _high(a.view(dtype), b.view(dtype))
        product = a.view(dtype).astype(wide_type) * b.view(dtype).astype(wide_type)
        return (product >> shift).astype(dtype).view(raw)

    product = {"lo": low, "wide": whole, "hi": high}[part]
    sources = [operands.source(one, bits) for one in of[:2]]
    target = operands.target(to, result)
    if operands.name == "mul":
        return assign(product, target, *sources)
    addend = operands.source(of[2], result)
    return assign(lambda a, b, c: product(a, b) + c, target, *sources, addend)


@instruction("div", "rem")
def divide(operands: Operands) -> Step:
    """Towards zero. The ISA leaves division by zero open: here all bits are ones."""
    if float_arithmetic.is_float(operands):
        return float_arithmetic.divide(operands)
    kind = operands.one_of(*INTEGERS)
    remainder = operands.name == "rem"

    def function(a: Array, b: Array) -> Array:
        by = np.where(b == 0, b.dtype.type(1), b)
        # fmod keeps the dividend's sign.
        rest = np.fmod(a, by)
        found = rest if remainder else (a - rest) // by
        return np.where(b == 0, np.array(-1).astype(b.dtype), found)

    return _integers(operands, kind, function, 2)


@instruction("min", "max")
def extreme(operands: Operands) -> Step:
    if float_arithmetic.is_float(operands):
        return float_arithmetic.extreme(operands)
    function = np.minimum if operands.name == "min" else np.maximum
    return _integers(operands, operands.one_of(*INTEGERS), function, 2)


@instruction("abs", "neg")
def sign(operands: Operands) -> Step:
    if float_arithmetic.is_float(operands):
        return float_arithmetic.sign(operands)
    function = np.abs if operands.name == "abs" else np.negative
    return _integers(operands, operands.one_of("s16", "s32", "s64"), function, 1)


@instruction("dp4a")
def dot_of_bytes(operands: Operands) -> Step:
    """Products of four bytes each, and a sum."""
    kinds = operands.one_of("s32", "u32"), operands.one_of("s32", "u32")
    to, a, b, c = operands.done(4)
    bytes_of = [np.int8 if kind == "s32" else np.uint8 for kind in kinds]

    def function(x: Array, y: Array, z: Array) -> Array:
        products = x.view(bytes_of[0]).astype(np.int64) * y.view(bytes_of[1]).astype(np.int64)
        return (products.reshape(-1, 4).sum(axis=1) + z.astype(np.int64)).astype(np.uint32)

    sources = [operands.source(one, 32) for one in (a, b, c)]
    return assign(function, operands.target(to, 32), *sources)
