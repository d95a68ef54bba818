"""Conversions and comparisons."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptx_machine.floats import from_bf16
from ptx_machine.snippets import each

ANY = st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32).map(
    lambda x: np.array(x, np.uint32)
)
FEW = settings(max_examples=15, deadline=None)


def f32(*values: float) -> np.ndarray:
    return np.resize(np.array(values, np.float32), 32).view(np.uint32)


def closest(x: float, candidates: dict[int, float], *, away: bool = False) -> int:
    """Bits of the nearest number; ties to even bits, or away from zero."""
    # Beyond the largest number the next one would be this.
    candidates = {
        b: math.copysign(2.0**128, y) if math.isinf(y) else y for b, y in candidates.items()
    }
    distance = {bits: abs(Fraction(y) - Fraction(x)) for bits, y in candidates.items()}
    least = min(distance.values())
    tied = [bits for bits, d in distance.items() if d == least]
    return max(tied, key=lambda bits: abs(candidates[bits])) if away else min(
        tied, key=lambda bits: bits & 1
    )  # fmt: skip


@given(ANY)
@FEW
def test_f32_to_bf16_and_tf32(a: np.ndarray) -> None:
    # Exponents of 255 are no numbers, and may be rounded to.
    a = a & np.uint32(0xFF7FFFFF)
    bf16, tf32 = each("cvt.rn.bf16.f32 %x, %a; cvt.rna.tf32.f32 %y, %a;", a, results=[16, 32])
    for word, x, short, long in zip(a, a.view(np.float32), bf16, tf32, strict=True):
        below = int(word) >> 16
        around = np.array([below, below + 1], np.uint16)
        candidates = dict(zip(around.tolist(), from_bf16(around).tolist(), strict=True))
        assert int(short) == closest(float(x), candidates)
        below = int(word) & 0xFFFFE000
        around = np.array([below, below + 0x2000], np.uint32)
        candidates = dict(zip(around.tolist(), around.view(np.float32).tolist(), strict=True))
        assert int(long) == closest(float(x), candidates, away=True)


def test_upper_and_lower_halves() -> None:
    a, b = f32(1.5, -2.0), f32(0.25, 70000.0)
    body = "cvt.rn.f16x2.f32 %x, %a, %b; cvt.rn.bf16x2.f32 %y, %a, %b; cvt.rz.f16.f32 %z, %b;"
    half, brain, cut = each(body, a, b, results=[32, 32, 16])
    assert half.view(np.float16)[:4].tolist() == [0.25, 1.5, math.inf, -2.0]
    assert from_bf16(brain.view(np.uint16))[:4].tolist() == [0.25, 1.5, 70144.0, -2.0]
    assert cut.view(np.float16)[:2].tolist() == [0.25, 65504.0]


def test_floats_to_integers_are_clamped() -> None:
    x = f32(1.5, -1.5, 2.5, 3e9, -3e9, 5e9, math.nan, -0.7)
    body = """cvt.rzi.s32.f32 %x, %a; cvt.rni.s32.f32 %y, %a; cvt.rzi.u32.f32 %z, %a;
              cvt.rmi.s32.f32 %u, %a; cvt.rzi.s64.f32 %v, %a;"""
    cut, near, unsigned, floor, wide = each(body, x, results=[32] * 4 + [64])
    low, high = -(2**31), 2**31 - 1
    assert cut.view(np.int32)[:8].tolist() == [1, -1, 2, high, low, high, 0, 0]
    assert near.view(np.int32)[:8].tolist() == [2, -2, 2, high, low, high, 0, -1]
    assert unsigned[:8].tolist() == [1, 0, 2, 3 * 10**9, 0, 2**32 - 1, 0, 0]
    assert floor.view(np.int32)[:8].tolist() == [1, -2, 2, high, low, high, 0, -1]
    assert wide.view(np.int64)[:8].tolist() == [
        1,
        -1,
        2,
        3 * 10**9,
        -3 * 10**9,
        5 * 10**9,
        -(2**63),
        0,
    ]


@given(ANY)
@FEW
def test_integers(a: np.ndarray) -> None:
    body = """cvt.u16.u32 %x, %a; cvt.s64.s32 %y, %a; cvt.rn.f32.s32 %z, %a;
              cvt.s32.s8 %u, %a; cvt.rn.f16.u32 %v, %a; cvt.u64.u32 %w, %a;"""
    short, signed, number, byte, half, wide = each(body, a, results=[16, 64, 32, 32, 16, 64])
    assert (short == a.astype(np.uint16)).all()
    assert (signed.view(np.int64) == a.view(np.int32)).all()
    assert (number.view(np.float32) == a.view(np.int32).astype(np.float32)).all()
    assert (byte.view(np.int32) == a.astype(np.uint8).view(np.int8)).all()
    with np.errstate(over="ignore"):
        assert (half.view(np.float16) == a.astype(np.float64).astype(np.float16)).all()
    assert (wide == a).all()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("lt", [1, 0, 0, 0]), ("le", [1, 1, 0, 0]), ("gtu", [0, 0, 1, 1]), ("equ", [0, 1, 0, 1]),
        ("ne", [1, 0, 1, 0]), ("neu", [1, 0, 1, 1]), ("num", [1, 1, 1, 0]), ("nan", [0, 0, 0, 1]),
    ],
)  # fmt: skip
def test_floats_in_order(order: str, expected: list[int]) -> None:
    a, b = f32(1, 2, 3, math.nan), f32(2, 2, 2, 2)
    body = f"""setp.{order}.f32 %p1, %a, %b; selp.b32 %x, 1, 0, %p1; set.{order}.f32.f32 %y, %a, %b;
               set.{order}.u32.f32 %z, %a, %b;"""
    chosen, one, ones = each(body, a, b, results=[32] * 3)
    assert chosen[:4].tolist() == expected
    assert one.view(np.float32)[:4].tolist() == expected
    assert ones.view(np.int32)[:4].tolist() == [-bit for bit in expected]


def test_integers_in_order_and_predicates_combined() -> None:
    a = np.array([0, 1, 2**31, 2**32 - 1] * 8, np.uint32)
    body = """setp.lt.s32 %p1, %a, 1; setp.lo.u32 %p2, %a, 2; setp.eq.and.b32 %p3|%p4, %a, 1, %p2;
              and.pred %p5, %p1, %p2; not.pred %p6, %p5; selp.b32 %x, 1, 0, %p1;
              selp.b32 %y, 1, 0, %p3; selp.b32 %z, 1, 0, %p4; selp.b32 %u, 1, 0, %p6;"""
    found = each(body, a, results=[32] * 4)
    assert [one[:4].tolist() for one in found] == [
        [1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]
    ]  # fmt: skip


def test_pairs_of_halves_in_order() -> None:
    a = np.array([1, 5, 3, np.nan] * 16, np.float16).view(np.uint32)
    b = np.array([2, 4, 3, 0] * 16, np.float16).view(np.uint32)
    body = """set.ge.f16x2.f16x2 %x, %a, %b; setp.ge.f16x2 %p1|%p2, %a, %b;
              selp.b32 %y, 1, 0, %p1; selp.b32 %z, 1, 0, %p2; set.ge.u32.f16x2 %u, %a, %b;"""
    halves, lower, upper, ones = each(body, a, b, results=[32] * 4)
    assert halves.view(np.float16)[:4].tolist() == [0, 1, 1, 0]
    assert (lower[:2].tolist(), upper[:2].tolist()) == ([0, 1], [1, 0])
    assert ones[:2].tolist() == [0xFFFF0000, 0x0000FFFF]


def test_f64() -> None:
    x = np.linspace(-3, 3, 32)
    body = """cvt.rn.f32.f64 %x, %a; cvt.f64.f32 %y, %x; cvt.rn.f64.s32 %z, %b;
              add.f64 %u, %a, %y; cvt.rn.f16.f64 %v, %a;"""
    narrow, back, number, total, half = each(
        body, x.view(np.uint64), np.arange(32, dtype=np.uint32), results=[32, 64, 64, 64, 16]
    )
    assert (narrow.view(np.float32) == x.astype(np.float32)).all()
    assert (back.view(np.float64) == x.astype(np.float32)).all()
    assert number.view(np.float64).tolist() == list(range(32))
    assert (total.view(np.float64) == x + x.astype(np.float32)).all()
    assert (half.view(np.float16) == x.astype(np.float16)).all()
