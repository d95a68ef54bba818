"""Loads and stores (PTX ISA 8.7, 9.7.9.8 and 9.7.9.12)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.decode import Operands, instruction
from ptx_machine.memory import Region
from ptx_machine.syntax import BITS
from ptx_machine.warp import LANES, RAW, Array, Mask, Step, Warp, note, write

_SCOPES = ("cta", "cluster", "gpu", "sys")
_CACHE_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")


def take_memory_modifiers(operands: Operands) -> tuple[str, int]:
    """Take what says how an access is ordered and cached; return space and elements.

    One CTA runs at a time and caches are coherent, so that all orders are kept anyway.
    """
    ordering = operands.optional("weak", "volatile", "relaxed", "acquire", "release")
    if ordering in ("relaxed", "acquire", "release"):
        operands.one_of(*_SCOPES)
    space = operands.one_of("global", "shared::cta", "shared", "param")
    for modifier in list(operands.modifiers):
        # Parts of L1::evict_last, L2::128B and the like
        if modifier in _CACHE_HINTS or modifier.startswith(("L1::", "L2::")):
            operands.modifiers.remove(modifier)
            if modifier == "L2::cache_hint":
                operands.operands.pop()
    count = int((operands.optional("v2", "v4") or "v1")[1:])
    return space.partition("::")[0], count


Finder = Callable[[Warp, Mask], tuple[Array, list[tuple[Region, Array | slice]]]]


_LANE = np.arange(LANES)


def locate(
    operands: Operands, space: str, text: str, size: int, *, store: bool, races: bool = True
) -> Finder:
    """What finds the addresses of an instruction's active threads, checked, and where they lie.

    Races are looked for too, but not of what is atomic or touches nothing.
    """
    base, offset = operands.address(text)
    bits = 64 if space == "global" else 32
    if space == "shared" and (found := operands.find(base)):
        bits = found[1]
    source = operands.source(base, bits)
    shift = RAW[bits](offset & ((1 << bits) - 1))
    what = operands.instruction
    everything = slice(None)

    def find(warp: Warp, mask: Mask) -> tuple[Array, list[tuple[Region, Array | slice]]]:
        addresses = warp.values[source]
        if mask is not None:
            addresses = addresses[mask]
        if offset:
            addresses = addresses + shift
        if space == "global":
            places = warp.memory.regions_of(addresses, size, what, store=store)
        else:
            warp.shared.check(addresses, size, what)
            places = [(warp.shared, everything)]
        if races and warp.races:
            lanes = _LANE if mask is None else _LANE[mask]
            for region in dict.fromkeys(region for region, _ in places):
                own = [np.arange(len(lanes))[part] for one, part in places if one is region]
                chosen = own[0] if len(own) == 1 else np.concatenate(own)
                note(warp, region, addresses[chosen], size, lanes[chosen], what, store=store)
        return addresses, places

    return find


@instruction("ld", "ldu")
def ld(operands: Operands) -> Step:
    """Loads; what is narrower than its register is extended, by its sign if the type has one."""
    space, count = take_memory_modifiers(operands)
    kind = operands.one_of(*BITS)
    to, of = operands.done(2)
    if space == "param":
        return _parameter(operands, to, of, kind)
    item = BITS[kind] // 8
    parts = operands.vector(to)
    if len(parts) != count:
        raise operands.refuse(f"expected {count} elements")
    widths = [_width(operands, part, BITS[kind]) for part in parts]
    targets = [operands.target(part, width) for part, width in zip(parts, widths, strict=True)]
    find = locate(operands, space, of, item * count, store=False)
    signed = kind[0] == "s"

    def extended(values: Array, width: int) -> Array:
        if width == 8 * item:
            return values
        if signed:
            values = values.view(f"i{item}").astype(f"i{width // 8}")
        return values.astype(RAW[width])

    def step(warp: Warp, mask: Mask) -> None:
        addresses, places = find(warp, mask)
        if len(places) == 1:
            loaded = places[0][0].load(addresses, item, count)
        else:
            loaded = np.concatenate([r.load(addresses[i], item, count) for r, i in places], axis=-1)
        R = warp.values
        for place, (target, width) in enumerate(zip(targets, widths, strict=True)):
            new = extended(loaded if count == 1 else loaded[place], width)
            if mask is not None:
                changed = R[target].copy()
                changed[mask] = new
                new = changed
            R[target] = new

    return step


def _width(operands: Operands, register: str, least: int) -> int:
    """Bits of a register that may be wider than what is moved (PTX ISA 8.7, 9.4.1)."""
    found = operands.find(register)
    width = found[1] if found else max(least, 16)
    if width < least or width == 1:
        raise operands.refuse(f"{register} is too narrow")
    return width


def _parameter(operands: Operands, to: str, of: str, kind: str) -> Step:
    name, offset = operands.address(of)
    if offset or name not in operands.slots.parameters:
        raise operands.refuse("no such parameter")
    source, type_ = operands.slots.parameters[name]
    declared = BITS[type_]
    if declared != BITS[kind]:
        raise operands.refuse(f"the parameter has {declared} bits")
    width = _width(operands, to, declared)
    target = operands.target(to, width)
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{declared // 8}")

    def step(warp: Warp, mask: Mask) -> None:
        value = warp.values[source]
        if width != declared:
            narrow = value.astype(f"u{declared // 8}").view(dtype)
            value = narrow.astype(f"{dtype.kind}{width // 8}").view(RAW[width])
        write(warp, mask, target, value)

    return step


@instruction("st")
def st(operands: Operands) -> Step:
    """Stores; of wider registers the low bits."""
    space, count = take_memory_modifiers(operands)
    kind = operands.one_of(*BITS)
    if space == "param":
        raise operands.refuse("calls")
    to, of = operands.done(2)
    item = BITS[kind] // 8
    parts = operands.vector(of)
    if len(parts) != count:
        raise operands.refuse(f"expected {count} elements")
    sources = [operands.source(part, _width(operands, part, BITS[kind])) for part in parts]
    find = locate(operands, space, to, item * count, store=True)

    def step(warp: Warp, mask: Mask) -> None:
        R = warp.values
        values = [R[source] if mask is None else R[source][mask] for source in sources]
        addresses, places = find(warp, mask)
        if len(places) == 1:
            places[0][0].store(addresses, item, values, warp.backward)
            return
        for region, i in places:
            region.store(addresses[i], item, [value[i] for value in values], warp.backward)

    return step
