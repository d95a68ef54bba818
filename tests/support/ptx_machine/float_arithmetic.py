"""Arithmetic of floats (PTX ISA 8.7, 9.7.3 to 9.7.5): rounded once, to nearest even.

Approximate instructions give the nearest f32 of the exact result: a device may be off by a few
units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.decode import Operands, assign, instruction
from ptx_machine.floats import F32, F64, FLOATS, flush, larger, smaller
from ptx_machine.warp import RAW, Array, Step

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
}  # fmt: skip


def _f32_of(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function computed in f64, rounded to f32."""
    return lambda x: function(x.astype(F64)).astype(F32)


APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": _f32_of(np.exp2),
    "lg2": _f32_of(np.log2),
    "rcp": _f32_of(np.reciprocal),
    "sqrt": np.sqrt,
    "rsqrt": _f32_of(lambda x: 1 / np.sqrt(x)),
    "sin": _f32_of(np.sin),
    "cos": _f32_of(np.cos),
    "tanh": _f32_of(np.tanh),
}


def compute(
    operands: Operands, kind: str, function: Callable[..., Array], *, ftz: bool, sources: int
) -> Step:
    """A step that computes with numbers of a type, once all modifiers are taken."""
    float_type = FLOATS[kind]
    read, write = float_type.read, float_type.write
    if ftz and kind != "f32":
        raise operands.refuse("ftz of 16 bits")
    to, *of = operands.done(1 + sources)
    places = [operands.source(one, float_type.bits) for one in of]

    def plain(*values: Array) -> Array:
        return write(function(*map(read, values)))

    def flushed(*values: Array) -> Array:
        return write(flush(function(*(flush(read(value)) for value in values))))

    def two(a: Array, b: Array) -> Array:
        return write(function(read(a), read(b)))

    fast = two if sources == 2 else plain
    return assign(flushed if ftz else fast, operands.target(to, float_type.bits), *places)


def is_float(operands: Operands) -> bool:
    return bool(operands.modifiers) and operands.modifiers[-1] in FLOATS


def binary(operands: Operands) -> Step:
    """``add``, ``sub``, ``mul``."""
    operands.optional("rn")
    ftz = operands.flag("ftz")
    return compute(operands, operands.one_of(*FLOATS), BINARY[operands.name], ftz=ftz, sources=2)


@instruction("fma")
def fma(operands: Operands) -> Step:
    operands.one_of("rn")
    ftz = operands.flag("ftz")
    kind = operands.one_of(*FLOATS)
    function = FLOATS[kind].fma
    if function is None:
        raise operands.refuse("fma")
    return compute(operands, kind, function, ftz=ftz, sources=3)


def divide(operands: Operands) -> Step:
    """``div``, rounded to nearest whatever was asked for; approximate has its narrow range."""
    how = operands.one_of("rn", "full", "approx")
    ftz = operands.flag("ftz")

    def approximate(a: Array, b: Array) -> Array:
        large = (np.abs(b) > 2.0**126) & np.isfinite(b)
        return np.where(large & np.isfinite(a), np.copysign(F32(0), a * np.sign(b)), a / b)

    function = approximate if how == "approx" else np.divide
    return compute(operands, operands.one_of("f32"), function, ftz=ftz, sources=2)


@instruction(*APPROXIMATE)
def approximate(operands: Operands) -> Step:
    operands.one_of(*(("approx", "rn") if operands.name in ("rcp", "sqrt") else ("approx",)))
    ftz = operands.flag("ftz")
    kind = operands.one_of(*(("f32", "f16", "f16x2") if operands.name == "ex2" else ("f32",)))
    function = APPROXIMATE[operands.name]
    if kind != "f32":
        return compute(
            operands, kind, lambda x: np.exp2(x.astype(F64)).astype(np.float16), ftz=ftz, sources=1
        )
    return compute(operands, kind, function, ftz=ftz, sources=1)


def extreme(operands: Operands) -> Step:
    """``min``, ``max``: with ``.NaN`` it wins, in its canonical form; else numbers do."""
    ftz, nan_wins = operands.flag("ftz"), operands.flag("NaN")
    kind = operands.one_of(*FLOATS)
    choose = smaller if operands.name == "min" else larger
    # Of one number or two; one is enough.
    float_type = FLOATS[kind]
    nan = float_type.read(np.array([float_type.nan], RAW[float_type.bits]))[:1]

    def function(a: Array, b: Array) -> Array:
        missing = np.isnan(a) | np.isnan(b) if nan_wins else np.isnan(a) & np.isnan(b)
        chosen = choose(a, b)
        return np.where(missing, nan, chosen) if missing.any() else chosen

    return compute(operands, kind, function, ftz=ftz, sources=2)


def sign(operands: Operands) -> Step:
    """``neg``, ``abs``: of the sign bits."""
    ftz = operands.flag("ftz")
    kind = operands.one_of(*FLOATS)
    if ftz:
        flushed: Callable[[Array], Array] = np.negative if operands.name == "neg" else np.abs
        return compute(operands, kind, flushed, ftz=True, sources=1)
    bits = FLOATS[kind].bits
    to, of = operands.done(2)
    mask = RAW[bits](FLOATS[kind].sign)
    keep = RAW[bits](~FLOATS[kind].sign & ((1 << bits) - 1))
    change = (lambda x: x ^ mask) if operands.name == "neg" else (lambda x: x & keep)
    return assign(change, operands.target(to, bits), operands.source(of, bits))


@instruction("copysign")
def copysign(operands: Operands) -> Step:
    """The second operand with the sign of the first."""
    kind = operands.one_of("f32")
    return compute(operands, kind, lambda a, b: np.copysign(b, a), ftz=False, sources=2)
