"""Floats against exact fractions, rounded once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptx_machine.floats import from_bf16
from ptx_machine.snippets import each

FORMS = {"f32": (24, -149, 32), "f16": (11, -24, 16), "bf16": (8, -133, 16)}
"""Bits of precision, exponent of the smallest number, width."""
FEW = settings(max_examples=20, deadline=None)


def nearest(number: Fraction, kind: str) -> float:
    """To nearest, ties to even."""
    precision, least, _ = FORMS[kind]
    if number == 0:
        return 0.0
    exponent = max(math.frexp(float(number))[1] - precision - 1, least)
    while abs(number) >= Fraction(2) ** (exponent + precision):
        exponent += 1
    if exponent > least and abs(number) < Fraction(2) ** (exponent + precision - 1):
        exponent -= 1
    units = round(number / Fraction(2) ** exponent)
    largest = {"f32": 2.0**128, "f16": 2.0**16, "bf16": 2.0**128}[kind]
    found = units * Fraction(2) ** exponent
    return math.copysign(math.inf, found) if abs(found) >= largest else float(found)


def numbers(raw: np.ndarray, kind: str) -> list[float]:
    if kind == "bf16":
        return from_bf16(raw).tolist()
    return raw.view({"f32": np.float32, "f16": np.float16}[kind]).tolist()


def words(kind: str) -> st.SearchStrategy[np.ndarray]:
    """Finite numbers, many of them near each other, so that sums cancel."""
    _, _, width = FORMS[kind]
    top = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[kind]
    near = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[kind]
    sign = st.sampled_from([0, 1 << (width - 1)])
    body = st.integers(0, top - 1) | st.integers(near - 9, near + 9) | st.integers(0, 9)
    one = st.tuples(sign, body).map(sum)
    return st.lists(one, min_size=32, max_size=32).map(lambda x: np.array(x, f"u{width // 8}"))


@pytest.mark.parametrize("kind", FORMS)
@given(data=st.data())
@FEW
def test_one_rounding(kind: str, data: st.DataObject) -> None:
    a, b, c = (data.draw(words(kind)) for _ in range(3))
    body = f"""add.{kind} %x, %a, %b; sub.rn.{kind} %y, %a, %b; mul.{kind} %z, %a, %b;
               fma.rn.{kind} %u, %a, %b, %c;"""
    found = each(body, a, b, c, results=[FORMS[kind][2]] * 4)
    x, y, z = ([Fraction(n) for n in numbers(one, kind)] for one in (a, b, c))
    expected = (
        [m + n for m, n in zip(x, y, strict=True)],
        [m - n for m, n in zip(x, y, strict=True)],
        [m * n for m, n in zip(x, y, strict=True)],
        [m * n + k for m, n, k in zip(x, y, z, strict=True)],
    )
    for got, want in zip(found, expected, strict=True):
        assert numbers(got, kind) == [nearest(number, kind) for number in want]


def f32(*values: float) -> np.ndarray:
    return np.resize(np.array(values, np.float32), 32).view(np.uint32)


def test_fma_where_two_roundings_differ() -> None:
    # 1 + 2**-24 is half-way to the next f32, and f64 loses what is beyond.
    a, b, c = f32(1 + 2.0**-12), f32(1 + 2.0**-12), f32(2.0**-11 * -1 + 2.0**-70)
    (found,) = each("fma.rn.f32 %x, %a, %b, %c;", a, b, c)
    exact = Fraction(1 + 2.0**-12) ** 2 + Fraction(float(c.view(np.float32)[0]))
    assert found.view(np.float32)[0] == nearest(exact, "f32")
    a, c = f32(1 + 2.0**-23), f32(2.0**-80)
    b = f32(2.0**-24 + 1)
    (found,) = each("fma.rn.f32 %x, %a, %b, %c;", a, f32(1.0), f32(2.0**-24 + 2.0**-47))
    assert found.view(np.float32)[0] == np.float32(1 + 2.0**-22)


def test_halves_of_a_register_are_apart() -> None:
    a = np.arange(64, dtype=np.float16)
    b = (np.arange(64) - 7).astype(np.float16) / np.float16(3)
    words = a.view(np.uint32), b.view(np.uint32)
    body = (
        "mul.f16x2 %x, %a, %b; fma.rn.f16x2 %y, %a, %b, %a; neg.f16x2 %z, %a; min.f16x2 %u, %a, %b;"
    )
    product, total, negative, least = each(body, *words, results=[32] * 4)
    assert (product.view(np.float16) == a * b).all()
    exact = a.astype(np.float64) * b.astype(np.float64) + a.astype(np.float64)
    assert (total.view(np.float16) == exact.astype(np.float16)).all()
    assert (negative.view(np.float16) == -a).all()
    assert (least.view(np.float16) == np.minimum(a, b)).all()


def test_extremes_of_nan_and_zeros() -> None:
    nan, zero = math.nan, 0.0
    a = f32(nan, 1.0, nan, zero, -zero, 2.0, -math.inf)
    b = f32(1.0, nan, nan, -zero, zero, 3.0, 1.0)
    body = "min.f32 %x, %a, %b; max.f32 %y, %a, %b; min.NaN.f32 %z, %a, %b;"
    least, most, wins = each(body, a, b, results=[32] * 3)
    canonical = 0x7FFFFFFF
    assert least[:7].tolist() == [*f32(1, 1)[:2], canonical, *f32(-zero, -zero, 2, -math.inf)[:4]]
    assert most[:7].tolist() == [*f32(1, 1)[:2], canonical, *f32(zero, zero, 3, 1)[:4]]
    assert wins[:7].tolist() == [canonical] * 3 + f32(-zero, -zero, 2, -math.inf)[:4].tolist()


def test_subnormals_are_flushed_where_asked() -> None:
    small = f32(2.0**-130, -(2.0**-130), 1.0)
    body = """add.f32 %x, %a, %b; add.ftz.f32 %y, %a, %b; ex2.approx.ftz.f32 %z, %c;
              mul.ftz.f32 %u, %a, %c;"""
    kept, flushed, power, product = each(
        body, small, f32(-0.0), f32(-127.0, 0.5, 3.0), results=[32] * 4
    )
    assert (kept == small).all()
    assert flushed[:3].tolist() == f32(0.0, -0.0, 1.0)[:3].tolist()
    assert power.view(np.float32)[:3].tolist() == [0.0, np.float32(math.sqrt(2)), 8.0]
    assert product[:3].tolist() == f32(-0.0, -0.0, 3.0)[:3].tolist()


def test_functions_are_the_nearest_f32() -> None:
    x = np.linspace(0.1, 9, 32).astype(np.float32)
    body = """rcp.approx.f32 %x, %a; sqrt.rn.f32 %y, %a; lg2.approx.f32 %z, %a;
              div.full.f32 %u, %a, %b; tanh.approx.f32 %v, %a; rsqrt.approx.f32 %w, %a;"""
    found = each(body, x.view(np.uint32), f32(3.0), results=[32] * 6)
    wide = x.astype(np.float64)
    expected = (1 / wide, np.sqrt(wide), np.log2(wide), wide / 3, np.tanh(wide), 1 / np.sqrt(wide))
    for got, want in zip(found, expected, strict=True):
        assert (got.view(np.float32) == want.astype(np.float32)).all()


def test_signs_are_bits() -> None:
    nan = np.array([0x7FC00001, 0xFFC00001, 0x80000000, 1] * 8, np.uint32)
    negative, positive = each("neg.f32 %x, %a; abs.f32 %y, %a;", nan, results=[32, 32])
    assert (negative == nan ^ np.uint32(0x80000000)).all()
    assert (positive == nan & np.uint32(0x7FFFFFFF)).all()
