"""Conversion: ``cvt`` (PTX ISA 8.7, 9.7.9.21)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.decode import Operands, assign, instruction
from ptx_machine.floats import F32, F64, FLOATS, flush, to_bf16, to_odd_f32
from ptx_machine.syntax import BITS
from ptx_machine.warp import RAW, Array, Step

U32 = np.uint32
_INTEGERS = tuple(f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64))
_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
Function = Callable[[Array], Array]


def _dtype(kind: str) -> np.dtype[np.generic]:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}")


@instruction("cvt")
def cvt(operands: Operands) -> Step:
    """Between integers and floats of any width, each way with the roundings below."""
    rounding = operands.optional("rn", "rz", "rna", *_TO_INTEGER)
    ftz = operands.flag("ftz")
    if operands.flag("sat") or operands.flag("satfinite"):
        raise operands.refuse("saturation")
    to = operands.one_of(*_INTEGERS, *_FLOATS, "f16x2", "bf16x2", "tf32")
    of = operands.one_of(*_INTEGERS, *_FLOATS)
    if ftz and "f32" not in (to, of):
        raise operands.refuse("ftz without f32")
    if to in ("f16x2", "bf16x2"):
        return _pair(operands, to, of, rounding, ftz=ftz)
    if to == "tf32":
        if (rounding, of, ftz) != ("rna", "f32", False):
            raise operands.refuse("conversion")
        return _step(operands, to_tf32, 32, 32)
    if to in _INTEGERS and of in _INTEGERS:
        if rounding:
            raise operands.refuse("rounding")
        return _step(operands, _between_integers(to), None, None, to, of)
    if to in _INTEGERS:
        return _step(operands, _to_integer(operands, to, of, rounding, ftz), None, BITS[of], to)
    if of in _INTEGERS:
        return _step(operands, _of_integer(operands, to, of, rounding), BITS[to], None, of=of)
    return _step(operands, _between_floats(operands, to, of, rounding, ftz), BITS[to], BITS[of])


def _step(
    operands: Operands,
    function: Function,
    target_bits: int | None,
    source_bits: int | None,
    to: str = "",
    of: str = "",
) -> Step:
    """A step of one operand. Registers of integers, without bits, may be wider than their type."""
    target, source = operands.done(2)
    if source_bits is None:
        found = operands.find(source)
        source_bits = found[1] if found else max(16, BITS[of])
        if source_bits < BITS[of]:
            raise operands.refuse(f"{source} is too narrow")
        narrow, dtype = np.dtype(f"u{BITS[of] // 8}"), _dtype(of)
        inner = function

        def function(x: Array) -> Array:
            return inner(x.astype(narrow, copy=False).view(dtype))

    if target_bits is None:
        found = operands.find(target)
        target_bits = found[1] if found else max(16, BITS[to])
        if target_bits < BITS[to]:
            raise operands.refuse(f"{target} is too narrow")
        raw, outer = RAW[target_bits], function
        wide = np.dtype(f"{'i' if to[0] == 's' else 'u'}{target_bits // 8}")
        return assign(
            lambda x: outer(x).astype(wide, copy=False).view(raw),
            operands.target(target, target_bits),
            operands.source(source, source_bits),
        )
    return assign(
        function, operands.target(target, target_bits), operands.source(source, source_bits)
    )


def _between_integers(to: str) -> Function:
    dtype = _dtype(to)
    return lambda x: x.astype(dtype)


def _read(of: str, ftz: bool) -> Function:
    read = FLOATS[of].read
    return (lambda x: flush(read(x))) if ftz and of == "f32" else read


def _to_integer(operands: Operands, to: str, of: str, rounding: str | None, ftz: bool) -> Function:
    """Clamped; NaN becomes 0, or the highest bit alone for 64 bits."""
    if rounding not in _TO_INTEGER:
        raise operands.refuse("rounding")
    read, cut, dtype = _read(of, ftz), _TO_INTEGER[rounding], _dtype(to)
    signed = to[0] == "s"
    most = (1 << (BITS[to] - signed)) - 1
    least = -most - 1 if signed else 0
    nan = dtype.type(0) if BITS[to] < 64 else np.array(1 << 63, np.uint64).astype(dtype)

    def function(x: Array) -> Array:
        number = cut(read(x).astype(F64))
        # Limits of 64 bits are no f64: what is at least as large as one is it.
        above, below = number >= float(most), number <= float(least)
        inside = np.where(above | below | np.isnan(number), 0.0, number).astype(dtype)
        found = np.where(above, dtype.type(most), np.where(below, dtype.type(least), inside))
        return np.where(np.isnan(number), nan, found)

    return function


def _of_integer(operands: Operands, to: str, of: str, rounding: str | None) -> Function:
    # Through f64, which is exact for 32 bits.
    if rounding != "rn" or (BITS[of] == 64 and to not in ("f32", "f64")):
        raise operands.refuse("conversion")
    if to == "f32":
        return lambda x: x.astype(F32).view(U32)
    narrow = _from_f64(to)
    return lambda x: narrow(x.astype(F64))


def _from_f64(to: str) -> Function:
    """f64 numbers to bits of another float, rounded once."""
    if to == "bf16":
        return lambda x: to_bf16(to_odd_f32(x))
    dtype, raw = {"f16": np.float16, "f32": F32, "f64": F64}[to], RAW[BITS[to]]
    return lambda x: x.astype(dtype).view(raw)


def _toward_zero(x: Array, to: str) -> Array:
    """f32 cut to 16 bits, as bits."""
    if to == "bf16":
        return np.where(np.isnan(x), U32(0x7FFF), x.view(U32) >> U32(16)).astype(np.uint16)
    near = x.astype(np.float16)
    past = np.abs(near.astype(F32)) > np.abs(x)
    return np.where(past & np.isfinite(x), near.view(np.uint16) - np.uint16(1),
                    near.view(np.uint16)).astype(np.uint16)  # fmt: skip


def _narrow(to: str, rounding: str) -> Function:
    """f32 numbers to bits of 16."""
    if rounding == "rz":
        return lambda x: _toward_zero(x, to)
    return to_bf16 if to == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)


def _between_floats(
    operands: Operands, to: str, of: str, rounding: str | None, ftz: bool
) -> Function:
    read = _read(of, ftz)
    if to == "f32" and of != "f64":
        if of == "f32" and rounding in _TO_INTEGER:
            cut = _TO_INTEGER[rounding]
            return lambda x: cut(read(x)).view(U32)
        if rounding:
            raise operands.refuse("rounding")
        return lambda x: read(x).astype(F32, copy=False).view(U32)
    if to == "f64" and not rounding:
        return lambda x: read(x).astype(F64).view(np.uint64)
    if of == "f64" and rounding == "rn":
        narrow = _from_f64(to)
    elif of == "f32" and rounding in ("rn", "rz") and to != "f64":
        narrow = _narrow(to, rounding)
    else:
        raise operands.refuse("conversion")
    return lambda x: narrow(read(x))


def _pair(operands: Operands, to: str, of: str, rounding: str | None, *, ftz: bool) -> Step:
    """Two f32 to halves: the first operand is the upper one."""
    if of != "f32" or rounding not in ("rn", "rz"):
        raise operands.refuse("conversion")
    narrow, read = _narrow(to.removesuffix("x2"), rounding), _read(of, ftz)
    target, high, low = operands.done(3)
    return assign(
        lambda x, y: narrow(read(x)).astype(U32) << U32(16) | narrow(read(y)),
        operands.target(target, 32),
        operands.source(high, 32),
        operands.source(low, 32),
    )


def to_tf32(bits: Array) -> Array:
    """f32 to 10 bits behind the point, to nearest, ties away from zero; the rest is zero."""
    number = np.isfinite(bits.view(F32))
    return np.where(number, (bits + U32(0x1000)) & U32(0xFFFFE000), bits)
