"""How lanes share a page's outliers out, and room for their running sums; also on the host."""
# mypy: allow-untyped-defs

from __future__ import annotations

from triton import constexpr_function

MOST_STEPS = 16
"""Entries that a lane has in registers."""


@constexpr_function
def chunks(capacity):
    """How many times the lanes share entries out."""
    return -(-capacity // (32 * MOST_STEPS))


@constexpr_function
def steps(capacity):
    """Entries of a lane in each of the ``chunks``."""
    return -(-capacity // (32 * chunks(capacity)))


@constexpr_function
def slots(capacity, least=0):
    """Running sums of a page: of the entries before each, and of all; room for ``least``."""
    return max(32 * steps(capacity) * chunks(capacity), least) + 1
