"""Comparison and choice: ``setp``, ``set``, ``selp`` (PTX ISA 8.7, 9.7.6 and 9.7.7)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.arithmetic import INTEGERS
from ptx_machine.decode import Operands, assign, instruction
from ptx_machine.floats import FLOATS, flush
from ptx_machine.syntax import BITS
from ptx_machine.warp import RAW, Array, Mask, Step, Warp, write

Compare = Callable[[Array, Array], Array]


def _unordered(compare: Compare) -> Compare:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


ORDERS: dict[str, Compare] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
OF_FLOATS: dict[str, Compare] = {
    **ORDERS,
    # Numbers that differ: false with a NaN
    "ne": lambda a, b: (a < b) | (a > b),
    **{f"{name}u": _unordered(compare) for name, compare in ORDERS.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
COMBINE: dict[str, Compare] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _comparison(operands: Operands, order: str, kind: str, *, ftz: bool) -> tuple[int, Compare]:
    """Bits of the operands, and a function of their raw values; bool, two a thread for halves."""
    if kind in FLOATS:
        read, compare = FLOATS[kind].read, OF_FLOATS.get(order)
        if compare is None or (ftz and kind != "f32"):
            raise operands.refuse("comparison")
        if ftz:
            return 32, lambda a, b: compare(flush(read(a)), flush(read(b)))
        return FLOATS[kind].bits, lambda a, b: compare(read(a), read(b))
    if kind in INTEGERS:
        dtype = INTEGERS[kind]
        names: dict[str, Compare] = {**ORDERS, **(UNSIGNED if kind[0] == "u" else {})}
    else:
        dtype = np.dtype(RAW[BITS[kind]])
        names = {name: ORDERS[name] for name in ("eq", "ne")}
    if ftz or order not in names:
        raise operands.refuse("comparison")
    function: Compare = names[order]
    if dtype.kind == "u":
        return BITS[kind], function
    return BITS[kind], lambda a, b: function(a.view(dtype), b.view(dtype))


_KINDS = (*INTEGERS, "b16", "b32", "b64", *FLOATS)
_ALL_ORDERS = (*OF_FLOATS, *UNSIGNED)


@instruction("setp")
def setp(operands: Operands) -> Step:
    """A predicate, and maybe its opposite, or one for each half."""
    order = operands.one_of(*_ALL_ORDERS)
    combine = operands.optional(*COMBINE)
    ftz = operands.flag("ftz")
    kind = operands.one_of(*_KINDS)
    bits, compare = _comparison(operands, order, kind, ftz=ftz)
    to, a, b, *more = operands.done(4 if combine else 3)
    names = [one.strip() for one in to.split("|")]
    halves = kind.endswith("x2")
    if halves and len(names) != 2:
        raise operands.refuse("two predicates are needed")
    targets = [operands.target(name, 1) for name in names]
    first, second = operands.source(a, bits), operands.source(b, bits)
    negated = bool(more) and more[0].startswith("!")
    third = operands.source(more[0].lstrip("!"), 1) if more else None
    join = COMBINE[combine] if combine else None
    if len(targets) == 1 and join is None:
        return assign(compare, targets[0], first, second)

    def step(warp: Warp, mask: Mask) -> None:
        R = warp.values
        found = compare(R[first], R[second])
        results = [found[0::2].copy(), found[1::2].copy()] if halves else [found, ~found]
        if join is not None and third is not None:
            other = ~R[third] if negated else R[third]
            results = [join(result, other) for result in results]
        for target, result in zip(targets, results, strict=False):
            write(warp, mask, target, result)

    return step


@instruction("set")
def set_(operands: Operands) -> Step:
    """1 and 0 as a float, or all bits and none."""
    order = operands.one_of(*_ALL_ORDERS)
    ftz = operands.flag("ftz")
    result = operands.one_of("u16", "s16", "u32", "s32", *FLOATS)
    kind = operands.one_of(*_KINDS)
    bits, compare = _comparison(operands, order, kind, ftz=ftz)
    to, a, b = operands.done(3)
    width = BITS[result]
    halves = kind.endswith("x2")
    if halves != result.endswith("x2") and not (halves and width == 32 and result in INTEGERS):
        raise operands.refuse("halves")
    item = RAW[16 if halves else width]
    if result in FLOATS:
        single = {"f16x2": "f16", "bf16x2": "bf16"}.get(result, result)
        one = item({"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[single])
    else:
        one = item((1 << (16 if halves else width)) - 1)

    def function(x: Array, y: Array) -> Array:
        return np.where(compare(x, y), one, item(0)).view(RAW[width])

    return assign(
        function,
        operands.target(to, width),
        operands.source(a, bits),
        operands.source(b, bits),
    )


@instruction("selp")
def selp(operands: Operands) -> Step:
    """One operand or the other."""
    bits = BITS[operands.one_of(*INTEGERS, "b16", "b32", "b64", "f32", "f64")]
    to, a, b, chooser = operands.done(4)

    def choose(x: Array, y: Array, p: Array) -> Array:
        return np.where(p, x, y)

    return assign(
        choose,
        operands.target(to, bits),
        operands.source(a, bits),
        operands.source(b, bits),
        operands.source(chooser, 1),
    )
