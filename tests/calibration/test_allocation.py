"""Widths by expected loss: exact, within the average, and told apart from nonsense."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calibration.allocation import (
    WIDTHS,
    allocate,
    budget,
    check_average,
    even_widths,
)
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError

losses_of_a_tensor = st.lists(st.floats(0, 10), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(losses_of_a_tensor, losses_of_a_tensor), min_size=1, max_size=3),
    average=st.floats(2, 4),
)
def test_no_other_widths_are_better(rows: list, average: float) -> None:
    losses = {
        (layer, kind): dict(zip(WIDTHS, one, strict=True))
        for layer, row in enumerate(rows)
        for kind, one in zip(("key", "value"), row, strict=True)
    }
    chosen = allocate(losses, average)
    tensors = sorted(losses)
    widths = [chosen[layer][kind == "value"] for layer, kind in tensors]
    assert sum(widths) <= budget(len(tensors), average)

    def total(some: tuple[int, ...] | list[int]) -> float:
        return sum(losses[tensor][width] for tensor, width in zip(tensors, some, strict=True))

    tried = itertools.product(WIDTHS, repeat=len(tensors))
    fits = [some for some in tried if sum(some) <= budget(len(tensors), average)]
    # Sums in another order.
    assert total(widths) <= min(map(total, fits)) * (1 + 1e-12)


def test_by_hand() -> None:
    """Five bits for two tensors: the third bit goes where it saves most, 8 against 1."""
    losses = {(7, "key"): {2: 9.0, 3: 1.0, 4: 0.5}, (7, "value"): {2: 2.0, 3: 1.0, 4: 0.0}}
    assert allocate(losses, 2.5) == {7: (3, 2)}
    # Seven bits: (4, 3) costs 1.5, (3, 4) costs 1.
    assert allocate(losses, 3.5) == {7: (3, 4)}


def test_bits_that_buy_nothing_are_not_spent() -> None:
    losses = {(0, "key"): dict.fromkeys(WIDTHS, 1.0), (0, "value"): dict.fromkeys(WIDTHS, 1.0)}
    assert allocate(losses, 4.0) == {0: (2, 2)}


@pytest.mark.parametrize("average", [2.0, 2.1, 2.75, 3.0, 3.99, 4.0])
@pytest.mark.parametrize("layers", [(0,), (0, 2, 5), tuple(range(32))])
def test_even_widths_use_the_whole_budget(layers: tuple[int, ...], average: float) -> None:
    widths = even_widths(layers, average)
    assert tuple(widths) == layers
    flat = [bits for pair in widths.values() for bits in pair]
    assert sum(flat) == budget(2 * len(layers), average)
    assert max(flat) - min(flat) <= 1
    assert set(flat) <= set(WIDTHS)


@pytest.mark.parametrize("average", [1.9, 4.1, float("nan"), float("inf"), -3.0])
def test_averages_that_are_none(average: float) -> None:
    with pytest.raises(ConfigError, match="expected 2 to 4"):
        check_average(average, KVQConfig())


def test_nothing_to_choose_by() -> None:
    with pytest.raises(ConfigError, match="needs sensitivity"):
        check_average(3.0, KVQConfig(sensitivity="none"))
