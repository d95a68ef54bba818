"""Integers against Python's, thread by thread."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptx_machine.snippets import each

EDGES = [0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32 - 2, 65535, 65536]
WORDS = st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(EDGES), min_size=32, max_size=32).map(
    lambda x: np.array(x, np.uint32)
)
FEW = settings(max_examples=15, deadline=None)


def values(raw: np.ndarray, kind: str) -> list[int]:
    return [int(x) for x in raw.view(f"{'i' if kind == 's' else 'u'}{raw.dtype.itemsize}")]


def wrapped(numbers: list[int], bits: int = 32) -> list[int]:
    return [number & (2**bits - 1) for number in numbers]


@given(WORDS, WORDS, WORDS)
@FEW
def test_sums_and_products(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    wide = c.astype(np.uint64) << np.uint64(17) | b
    for kind in "us":
        x, y, z = values(a, kind), values(b, kind), values(c, kind)
        pairs = list(zip(x, y, strict=True))
        body = f"""
            add.{kind}32 %x, %a, %b; sub.{kind}32 %y, %a, %b; mul.lo.{kind}32 %z, %a, %b;
            mul.hi.{kind}32 %u, %a, %b; mad.lo.{kind}32 %v, %a, %b, %c;
            mad.wide.{kind}32 %w, %a, %b, %d;"""
        found = each(body, a, b, c, wide, results=[32] * 5 + [64])
        assert found[0].tolist() == wrapped([m + n for m, n in pairs])
        assert found[1].tolist() == wrapped([m - n for m, n in pairs])
        assert found[2].tolist() == wrapped([m * n for m, n in pairs])
        assert found[3].tolist() == wrapped([m * n >> 32 for m, n in pairs])
        assert found[4].tolist() == wrapped([m * n + k for (m, n), k in zip(pairs, z, strict=True)])
        addends = values(wide, kind)
        expected = [m * n + k for (m, n), k in zip(pairs, addends, strict=True)]
        assert found[5].tolist() == wrapped(expected, 64)


@given(WORDS, WORDS)
@FEW
def test_64_bits(low: np.ndarray, high: np.ndarray) -> None:
    a = high.astype(np.uint64) << np.uint64(32) | low
    b = a[::-1].copy() >> np.uint64(5)
    for kind in "us":
        pairs = list(zip(values(a, kind), values(b, kind), strict=True))
        body = f"mul.hi.{kind}64 %x, %a, %b; mul.lo.{kind}64 %y, %a, %b; max.{kind}64 %z, %a, %b;"
        found = each(body, a, b, results=[64] * 3)
        assert found[0].tolist() == wrapped([m * n >> 64 for m, n in pairs], 64)
        assert found[1].tolist() == wrapped([m * n for m, n in pairs], 64)
        assert found[2].tolist() == wrapped([max(pair) for pair in pairs], 64)


@given(WORDS, WORDS.map(lambda x: np.where(x == 0, np.uint32(3), x)))
@FEW
def test_division_is_towards_zero(a: np.ndarray, b: np.ndarray) -> None:
    def quotient(m: int, n: int) -> int:
        return abs(m) // abs(n) * (1 if (m < 0) == (n < 0) else -1)

    for kind in "us":
        pairs = list(zip(values(a, kind), values(b, kind), strict=True))
        found = each(f"div.{kind}32 %x, %a, %b; rem.{kind}32 %y, %a, %b;", a, b, results=[32, 32])
        assert found[0].tolist() == wrapped([quotient(m, n) for m, n in pairs])
        assert found[1].tolist() == wrapped([m - n * quotient(m, n) for m, n in pairs])


@given(WORDS, WORDS, WORDS)
@FEW
def test_extremes_signs_and_dots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    x, y = values(a, "s"), values(b, "s")
    body = """min.s32 %x, %a, %b; max.u32 %y, %a, %b; abs.s32 %z, %a; neg.s32 %u, %a;
              dp4a.s32.u32 %v, %a, %b, %c;"""
    found = each(body, a, b, c, results=[32] * 5)
    assert found[0].tolist() == wrapped([min(p) for p in zip(x, y, strict=True)])
    assert found[1].tolist() == np.maximum(a, b).tolist()
    assert found[2].tolist() == wrapped([abs(m) for m in x])
    assert found[3].tolist() == wrapped([-m for m in x])
    dots = [
        sum(int(m) * int(n) for m, n in zip(p, q, strict=True))
        for p, q in zip(
            a.view(np.int8).reshape(32, 4), b.view(np.uint8).reshape(32, 4), strict=True
        )
    ]
    assert found[4].tolist() == wrapped([d + int(k) for d, k in zip(dots, c, strict=True)])


@pytest.mark.parametrize("kind", ["u16", "s16"])
def test_16_bits(kind: str) -> None:
    a = (np.arange(32) * 2741).astype(np.uint16)
    b = (np.arange(32)[::-1] * 6007).astype(np.uint16)
    pairs = list(zip(values(a, kind[0]), values(b, kind[0]), strict=True))
    body = f"mul.wide.{kind} %x, %a, %b; mul.hi.{kind} %y, %a, %b; sub.{kind} %z, %a, %b;"
    found = each(body, a, b, results=[32, 16, 16])
    assert found[0].tolist() == wrapped([m * n for m, n in pairs])
    assert found[1].tolist() == wrapped([m * n >> 16 for m, n in pairs], 16)
    assert found[2].tolist() == wrapped([m - n for m, n in pairs], 16)


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %x, %a, %a;", "add.cc.s32 %x, %a, %a;", "frobnicate.b32 %x, %a;",
        "mul.lo.f32 %x, %a, %a;", "add.rz.f32 %x, %a, %a;", "mad24.lo.s32 %x, %a, %a, %a;",
        "add.s64 %x, %a, %a;", "add.s32 %x, %a;", "mov.u32 %x, nowhere;", "sqrt.rn.f16 %x, %a;",
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(NotImplementedError, match=r"line \d+: " + re.escape(line[:-1])):
        each(line, np.zeros(32, np.uint32))
