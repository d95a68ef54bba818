"""Bits against definitions in Python's integers, thread by thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptx_machine.snippets import each

WORD = st.integers(0, 2**32 - 1)
WORDS = st.lists(WORD, min_size=32, max_size=32).map(lambda x: np.array(x, np.uint32))
SMALL = st.lists(st.integers(0, 70), min_size=32, max_size=32).map(
    lambda x: np.array([*x[:-2], 255, 2**32 - 1], np.uint32)
)
FEW = settings(max_examples=15, deadline=None)
ONES = 2**32 - 1


def check(found: np.ndarray, define: Callable[..., int], *inputs: np.ndarray) -> None:
    expected = [define(*map(int, thread)) for thread in zip(*inputs, strict=True)]
    assert found.tolist() == expected


def permuted(a: int, b: int, selector: int) -> int:
    pair = (b << 32) | a
    result = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = pair >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * place
    return result


@given(WORDS, WORDS, WORDS)
@FEW
def test_prmt(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    (found,) = each("prmt.b32 %x, %a, %b, %c;", a, b, c)
    check(found, permuted, a, b, c)
    selector = int(c[0]) & 0xFFFF
    (found,) = each(f"prmt.b32 %x, %a, %b, 0x{selector:x}U;", a, b)
    check(found, lambda a, b: permuted(a, b, selector), a, b)


@given(WORDS, WORDS, WORDS, st.integers(0, 255))
@FEW
def test_lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> None:
    def define(a: int, b: int, c: int) -> int:
        bits = (
            table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)
        )
        return sum(bit << i for i, bit in enumerate(bits))

    (found,) = each(f"lop3.b32 %x, %a, %b, %c, {table};", a, b, c)
    check(found, define, a, b, c)
    # A choice by bits: 0xE4 takes a where c is set, and b elsewhere.
    (found,) = each("lop3.b32 %x, %a, %b, %c, 0xE4;", a, b, c)
    check(found, lambda a, b, c: (a & c) | (b & ~c & ONES), a, b, c)


@given(WORDS, SMALL)
@FEW
def test_shifts_are_clamped(a: np.ndarray, by: np.ndarray) -> None:
    signed = a.view(np.int32)
    (found,) = each("shl.b32 %x, %a, %b;", a, by)
    check(found, lambda a, n: (a << n) & ONES if n < 32 else 0, a, by)
    (found,) = each("shr.u32 %x, %a, %b;", a, by)
    check(found, lambda a, n: a >> n if n < 32 else 0, a, by)
    (found,) = each("shr.s32 %x, %a, %b;", a, by)
    check(found, lambda a, n: (a >> min(n, 31)) & ONES, signed, by)


@pytest.mark.parametrize("by", [0, 1, 15, 16, 31, 32, 33, 63, 64, 200])
def test_shifts_by_constants(by: int) -> None:
    word = np.arange(32, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for bits in (16, 32, 64):
        a = (word >> np.uint64(64 - bits)).astype(f"u{bits // 8}")
        body = f"shl.b{bits} %x, %a, {by}; shr.u{bits} %y, %a, {by}; shr.s{bits} %z, %a, {by};"
        left, right, arithmetic = each(body, a, results=[bits] * 3)
        most = 2**bits - 1
        check(left, lambda a, most=most, bits=bits: (a << by) & most, a)
        check(right, lambda a: a >> by, a)
        check(arithmetic, lambda a, most=most: (a >> by) & most, a.view(f"i{bits // 8}"))


@given(WORDS, WORDS, SMALL)
@FEW
def test_funnel_shifts(a: np.ndarray, b: np.ndarray, by: np.ndarray) -> None:
    def left(a: int, b: int, n: int) -> int:
        return ((b << 32 | a) << n >> 32) & ONES

    def right(a: int, b: int, n: int) -> int:
        return ((b << 32 | a) >> n) & ONES

    for name, define in (("l", left), ("r", right)):
        (found,) = each(f"shf.{name}.wrap.b32 %x, %a, %b, %c;", a, b, by)
        check(found, lambda a, b, n, define=define: define(a, b, n & 31), a, b, by)
        (found,) = each(f"shf.{name}.clamp.b32 %x, %a, %b, %c;", a, b, by)
        check(found, lambda a, b, n, define=define: define(a, b, min(n, 32)), a, b, by)


def field(word: int, start: int, length: int, bits: int, signed: bool) -> int:
    """The ISA's own loop over bits."""
    start, length = start & 255, length & 255
    last = min(start + length - 1, bits - 1)
    fill = bool(signed and length and word >> last & 1)
    result = 0
    for i in range(bits):
        inside = i < length and start + i < bits
        result |= (word >> (start + i) & 1 if inside else fill) << i
    return result


@given(WORDS, SMALL, SMALL)
@FEW
def test_fields(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
    first, size = int(start[0]), int(length[0])
    for kind in "us":
        (found,) = each(f"bfe.{kind}32 %x, %a, %b, %c;", a, start, length)
        check(found, lambda *x, kind=kind: field(*x, 32, kind == "s"), a, start, length)
        (found,) = each(f"bfe.{kind}32 %x, %a, {first}, {size};", a)
        check(found, lambda x, kind=kind: field(x, first, size, 32, kind == "s"), a)
    wide = a.astype(np.uint64) << np.uint64(32) | a[::-1]
    (found,) = each("bfe.s64 %x, %a, %b, %c;", wide, start, length, results=[64])
    check(found, lambda *x: field(*x, 64, True), wide, start, length)

    def inserted(a: int, b: int, start: int, length: int) -> int:
        for i in range(length & 255):
            place = (start & 255) + i
            if place < 32 and i < 32:
                b = b & ~(1 << place) | (a >> i & 1) << place
        return b

    (found,) = each("bfi.b32 %x, %a, %b, %c, %d;", a, a[::-1], start, length)
    check(found, inserted, a, a[::-1], start, length)


@given(WORDS)
@FEW
def test_counts_and_logic(a: np.ndarray) -> None:
    body = "popc.b32 %x, %a; clz.b32 %y, %a; brev.b32 %z, %a; not.b32 %u, %a; xor.b32 %v, %a, 7;"
    ones, leading, backward, inverted, changed = each(body, a, results=[32] * 5)
    check(ones, int.bit_count, a)
    check(leading, lambda a: 32 - a.bit_length(), a)
    check(backward, lambda a: int(f"{a:032b}"[::-1], 2), a)
    check(inverted, lambda a: ~a & ONES, a)
    check(changed, lambda a: a ^ 7, a)
