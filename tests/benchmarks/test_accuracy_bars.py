"""The bars of the accuracy benchmark, by hand."""

from __future__ import annotations

import math

import pytest
from accuracy_bars import BARS, NEAR_BITS, Bar, Point, at_bits, below_the_line, judge
from hypothesis import given
from hypothesis import strategies as st

TWO = Point("two", 2.0, 0.08, 0.008)
FOUR = Point("four", 4.0, 0.02, 0.001)


def test_between_two_settings_log_kl_is_a_straight_line() -> None:
    """In the middle the geometric mean, with half of both relative errors, 10 and 5 %."""
    found = at_bits([TWO, FOUR], 3.0)
    assert found is not None
    assert found.kl == pytest.approx(0.04)
    assert found.stderr == pytest.approx(0.04 * math.hypot(0.05, 0.025))
    assert found.settings == "two and four"
    # A quarter of the way: 0.08 * (1 / 4)**(1 / 4).
    quarter = at_bits([TWO, FOUR], 2.5)
    assert quarter is not None
    assert quarter.kl == pytest.approx(0.08 / math.sqrt(2))
    assert quarter.stderr == pytest.approx(quarter.kl * math.hypot(0.075, 0.0125))


def test_at_a_setting_the_line_is_the_setting() -> None:
    for one in (TWO, FOUR):
        found = at_bits([FOUR, TWO], one.bits)
        assert found is not None
        assert (found.kl, found.stderr) == pytest.approx((one.kl, one.stderr))


@pytest.mark.parametrize("bits", [1.75, 1.99])
def test_a_little_below_the_fewest_bits_the_smallest_setting_stands(bits: float) -> None:
    found = at_bits([FOUR, TWO], bits)
    assert found is not None
    assert (found.kl, found.stderr, found.settings) == (0.08, 0.008, "two")


def test_elsewhere_there_is_nothing() -> None:
    assert at_bits([TWO, FOUR], 4.01) is None
    assert at_bits([TWO, FOUR], 1.74) is None
    assert at_bits([TWO], 2.01) is None
    assert at_bits([], 2.0) is None


def test_the_nearest_settings_count() -> None:
    settings = [FOUR, Point("three", 3.0, 0.03), Point("eight", 8.0, 1e-6), TWO]
    found = at_bits(settings, 3.5)
    assert found is not None
    assert found.kl == pytest.approx(math.sqrt(0.03 * 0.02))
    assert found.settings == "three and four"
    # An error that is unknown counts as none: half of four's 5 %.
    assert found.stderr == pytest.approx(found.kl * 0.025)


POINTS = st.lists(
    st.tuples(st.integers(8, 64), st.floats(1e-6, 10.0)),
    min_size=2,
    max_size=6,
    unique_by=lambda point: point[0],
)


@given(POINTS, st.floats(1.0, 8.0))
def test_a_line_stays_between_its_neighbours(points: list, bits: float) -> None:
    settings = [Point(f"{eighths}", eighths / 8, kl) for eighths, kl in points]
    found = at_bits(settings, bits)
    assert at_bits(settings[::-1], bits) == found
    lower = [s for s in settings if s.bits < bits]
    upper = [s for s in settings if s.bits >= bits]
    if not upper or (not lower and min(s.bits for s in upper) > bits + NEAR_BITS):
        assert found is None
        return
    assert found is not None
    b = min(upper, key=lambda s: s.bits)
    a = max(lower, key=lambda s: s.bits) if lower else b
    assert min(a.kl, b.kl) * (1 - 1e-9) <= found.kl <= max(a.kl, b.kl) * (1 + 1e-9)


BAR = Bar("about 3 bits", (3.0, 3.5), 0.4)
RIVALS = {
    # At 3 bits 0.04, at 3.5 bits 0.04 / sqrt(2).
    "line": [Point("a", 2.0, 0.08), Point("b", 4.0, 0.02)],
    "worse": [Point("c", 2.0, 0.8), Point("d", 5.0, 0.5)],
    "KVQuant": [Point("e", 2.0, 1e-5), Point("f", 5.0, 1e-5)],
    "KVQuant 1 %": [Point("g", 2.0, 1e-6), Point("h", 5.0, 1e-6)],
    # Far better, but it has no setting of as many bits as ours.
    "small": [Point("i", 2.5, 1e-4)],
}


def test_ours_against_the_best_rival_at_its_bits() -> None:
    ours = [Point("low", 3.0, 0.01), Point("high", 3.5, 0.01 / math.sqrt(2) / 2)]
    first, second = judge(BAR, ours, RIVALS)
    # The better ratio first.
    assert (first.ours.name, second.ours.name) == ("high", "low")
    assert (first.rival, second.rival) == ("line", "line")
    assert second.ratio == pytest.approx(0.01 / 0.04)
    assert first.ratio == pytest.approx(1 / 8)
    assert first.met
    assert second.met
    assert second.at.settings == "a and b"
    assert second.bar is BAR


def test_only_settings_within_the_bars_bits_count() -> None:
    ours = [Point(f"{bits}", bits, 0.001) for bits in (2.99, 3.0, 3.5, 3.51)]
    assert {verdict.ours.name for verdict in judge(BAR, ours, RIVALS)} == {"3.0", "3.5"}


@pytest.mark.parametrize(
    ("kl", "stderr", "rival_stderr", "met"),
    [
        # 0.4 of 0.04 is 0.016.
        (0.0159, None, None, True),
        (0.0161, None, None, False),
        (0.012, 0.0019, None, True),
        (0.012, 0.0021, None, False),
        # 0.4 times the rival's error counts, both settings having it: 0.4 * 0.0048 is 0.00192.
        (0.012, None, 0.0048, True),
        (0.012, None, 0.0052, False),
        # Each alone would do; together they are the root of 2 times as much.
        (0.012, 0.0019, 0.0048, False),
    ],
)
def test_met_means_by_two_standard_errors(
    kl: float, stderr: float | None, rival_stderr: float | None, met: bool
) -> None:
    rivals = {"only": [Point("r", 3.2, 0.04, rival_stderr)]}
    (verdict,) = judge(BAR, [Point("ours", 3.2, kl, stderr)], rivals)
    assert verdict.met == met


def test_rivals_that_are_named() -> None:
    bar = Bar("KVQuant", (3.0, 3.5), 0.75, ("KVQuant", "absent"))
    (verdict,) = judge(bar, [Point("ours", 3.2, 2e-5)], RIVALS)
    assert verdict.rival == "KVQuant"
    assert verdict.ratio == pytest.approx(2.0)
    assert not verdict.met


def test_without_a_rival_at_our_bits_there_is_no_verdict() -> None:
    few = {"small": RIVALS["small"], "KVQuant": RIVALS["KVQuant"]}
    assert judge(BAR, [Point("ours", 3.2, 0.01)], few) == []
    assert judge(BAR, [], RIVALS) == []


def test_how_far_below_the_line() -> None:
    three = Point("three", 3.0, 0.02)
    # The line is at 0.04 in the middle.
    assert below_the_line(TWO, Point("x", 2.5, 0.03), three) == pytest.approx(0.25)
    assert below_the_line(TWO, Point("x", 2.5, 0.04), three) == pytest.approx(0.0)
    assert below_the_line(TWO, Point("x", 2.5, 0.05), three) == pytest.approx(-0.25)
    assert below_the_line(TWO, Point("x", 2.25, 0.04), three) == pytest.approx(1 - 2**-0.5)


def test_bars_can_be_met_and_missed() -> None:
    for bar in BARS:
        low, high = bar.bits
        assert 2 <= low < high <= 5
        rival = bar.rivals[0] if bar.rivals else "any"
        rivals = {rival: [Point("a", 1.0, 1.0), Point("b", 6.0, 1.0)]}
        for share, met in ((0.99, True), (1.01, False)):
            (verdict,) = judge(bar, [Point("ours", low, share * bar.factor)], rivals)
            assert verdict.met == met
