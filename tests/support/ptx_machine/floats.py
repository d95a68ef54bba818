"""Floats of a few widths: from raw bits to numbers and back, with one rounding.

Numbers are computed in the type itself where numpy has it (f32, f16) and in f32 for bf16. NaN keeps
whatever payload numpy gives it: the ISA leaves that open, but for min and max.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64


def flush(x: Array) -> Array:
    """``.ftz``: f32 subnormals become zeros of the same sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def from_bf16(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: Array) -> Array:
    """Round f32 to nearest, ties to even; bits as u16."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(np.uint16)


def sum_to_odd(x: Array, y: Array) -> Array:
    """f64 sum, rounded to the neighbour with an odd last bit where it is inexact.

    A second rounding, to any float of at most 51 bits, then gives what one rounding of the exact
    sum gives (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    total = x + y
    # Knuth's two-sum: total + error is exact.
    part = total - x
    error = (x - (total - part)) + (y - part)
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    return np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(F64)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` with a single rounding, f32."""
    product = a.astype(F64) * b.astype(F64)
    addend = c.astype(F64)
    total = product + addend
    # Rounding twice differs only if the first result is half-way between two f32, which has other
    # bits below the smallest normal number.
    half_way = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if np.count_nonzero(half_way) or np.count_nonzero(np.abs(total) < 2.0**-126):
        total = sum_to_odd(product, addend)
    return total.astype(F32)


def to_odd_f32(x: Array) -> Array:
    """f64 to f32, to the neighbour with an odd last bit where it is inexact (``sum_to_odd``)."""
    nearest = x.astype(F32)
    error = x - nearest.astype(F64)
    bits = nearest.view(np.int32)
    inexact = np.isfinite(nearest) & (error != 0) & ((bits & 1) == 0)
    moved = bits + np.where((error > 0) == (x > 0), 1, -1).astype(np.int32)
    return np.where(inexact, moved, bits).view(F32)


def fma_bf16(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of bf16 numbers in f32, ready for one rounding to bf16."""
    return to_odd_f32(sum_to_odd(a.astype(F64) * b.astype(F64), c.astype(F64)))


def fma_f16(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of f16: what f64 loses is far below half a unit of f16."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(np.float16)


def smaller(a: Array, b: Array) -> Array:
    """Minimum by the ISA: a number beside NaN, and -0 below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def larger(a: Array, b: Array) -> Array:
    """Maximum by the ISA: a number beside NaN, and +0 above -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


@dataclass(frozen=True)
class FloatType:
    """How registers hold numbers of a type.

    Fields:
        bits: of a register.
        read, write: raw bits to numbers and back, rounded once.
        fma: numbers to numbers that ``write`` takes; None where there is none.
        sign, nan: bits of a register, of one number or two.
    """

    bits: int
    read: Callable[[Array], Array]
    write: Callable[[Array], Array]
    fma: Callable[[Array, Array, Array], Array] | None
    sign: int
    nan: int


FLOATS = {
    "f32": FloatType(
        32, lambda x: x.view(F32), lambda x: x.view(U32), fma_f32, 0x80000000, 0x7FFFFFFF
    ),
    "f64": FloatType(
        64, lambda x: x.view(F64), lambda x: x.view(U64), None, 1 << 63, (1 << 63) - 1
    ),
    "f16": FloatType(
        16, lambda x: x.view(np.float16), lambda x: x.view(np.uint16), fma_f16, 0x8000, 0x7FFF
    ),
    "f16x2": FloatType(
        32, lambda x: x.view(np.float16), lambda x: x.view(U32), fma_f16, 0x80008000, 0x7FFF7FFF
    ),
    "bf16": FloatType(16, from_bf16, to_bf16, fma_bf16, 0x8000, 0x7FFF),
    "bf16x2": FloatType(
        32,
        lambda x: from_bf16(x.view(np.uint16)),
        lambda x: to_bf16(x).view(U32),
        fma_bf16,
        0x80008000,
        0x7FFF7FFF,
    ),
}
