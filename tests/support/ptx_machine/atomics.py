"""Atomic operations (PTX ISA 8.7, 9.7.13.5): threads of a warp one after another.

The order of threads is the machine's: a sum of floats depends on it, as it may on a device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.accesses import locate
from ptx_machine.decode import Operands, instruction
from ptx_machine.floats import FLOATS
from ptx_machine.syntax import BITS
from ptx_machine.warp import RAW, Array, Mask, Step, Warp, write

_KINDS = ("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f16", "f16x2", "bf16", "bf16x2")
_INTEGERS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new,
}  # fmt: skip
Update = Callable[[Array, Array, Array], Array]
"""Old value, and one or two operands, to a new one; raw bits."""


def _update(operands: Operands, name: str, kind: str) -> Update:
    bits = BITS[kind]
    if name == "cas":
        return lambda old, b, c: np.where(old == b, c, old)
    if kind in FLOATS:
        read, put = FLOATS[kind].read, FLOATS[kind].write
        if name == "exch":
            return lambda old, b, c: b
        if name != "add":
            raise operands.refuse("atomic")
        return lambda old, b, c: put(read(old) + read(b))
    if kind[0] == "b" and name not in ("and", "or", "xor", "exch"):
        raise operands.refuse("atomic")
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    function = _INTEGERS[name]
    return lambda old, b, c: function(old.view(dtype), b.view(dtype)).view(RAW[bits])


@instruction("atom", "red")
def atomic(operands: Operands) -> Step:
    """Change a place in memory, and give what was there before."""
    orders = ("relaxed", "acquire", "release", "acq_rel")
    for modifier in (*orders, "cta", "cluster", "gpu", "sys", "noftz"):
        operands.flag(modifier)
    shared = operands.flag("shared") or operands.flag("shared::cta")
    if not shared and not operands.flag("global"):
        raise operands.refuse("generic addresses")
    name = operands.one_of(*_INTEGERS, "cas")
    kind = operands.one_of(*_KINDS)
    bits = BITS[kind]
    returns = operands.name == "atom"
    of = list(operands.done(1 + returns + (2 if name == "cas" else 1)))
    target = operands.target(of.pop(0), bits) if returns else None
    place, first, *more = of
    sources = [operands.source(one, bits) for one in (first, *more)]
    space = "shared" if shared else "global"
    find = locate(operands, space, place, bits // 8, store=True, races=False)
    update = _update(operands, name, kind)

    def step(warp: Warp, mask: Mask) -> None:
        addresses, places = find(warp, mask)
        values = [warp.values[source] for source in sources]
        if mask is not None:
            values = [value[mask] for value in values]
        b, c = values[0], values[-1]
        old: Array = np.empty(len(addresses), RAW[bits])
        for region, chosen in places:
            items = region.items(bits // 8, 1)
            index = region.index(addresses, bits // 8)
            lanes = np.arange(len(addresses))[chosen]
            for lane in lanes[::-1] if warp.backward else lanes:
                one, where = slice(lane, lane + 1), slice(index[lane], index[lane] + 1)
                old[one] = items[where]
                items[where] = update(old[one], b[one], c[one])
        if target is not None:
            before = old
            if mask is not None:
                before = warp.values[target].copy()
                before[mask] = old
            write(warp, mask, target, before)

    return step
