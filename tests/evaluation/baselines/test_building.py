"""Names taken apart; what is built of them is tested with ``kvq.evaluate`` and ``kvq eval``."""

from __future__ import annotations

import pytest

from kvq_evaluation.baselines.building import parse_baselines
from kvq_formats.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ((), []),
        ("fp8", ["fp8"]),
        (["kivi2-g64, fp8", "int4", "fp8,"], ["kivi2-g64", "fp8", "int4"]),
    ],
)
def test_each_name_once_in_order(given: str | list[str] | None, names: list[str]) -> None:
    assert [one.name for one in parse_baselines(given)] == names


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no baseline 'kivy2'"):
        parse_baselines(["fp8", "kivy2"])
