"""Weighted values of a page: packed values by weights, 32 channels at a time."""
# mypy: allow-untyped-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvq_kernels.nvidia.half_pairs import to_operand
from kvq_kernels.nvidia.layouts import CHANNELS, HEADS, MMA, A, value_operand
from kvq_kernels.nvidia.lookups import selectors, spare_words, subset_of, value_numbers


@gluon.jit
def _add_group(
    sums,
    words,
    table,
    weights,
    FIRST: gl.constexpr,
    GROUP_OF_PLANE: gl.constexpr,
    BITS: gl.constexpr,
):
    selector = selectors(words, GROUP_OF_PLANE, BITS)
    for part in gl.static_range(2):
        numbers = value_numbers(words, selector[part], table, part, BITS)
        for place in gl.static_range(2):
            operand = to_operand(value_operand(numbers[place]), A)
            sums = mma_v2(operand, weights[FIRST + subset_of(part, place, BITS)], sums)
    return sums


@gluon.jit
def weighted_values(words, table, weights, D: gl.constexpr, BITS: gl.constexpr):
    """Sums over a page of ``(1024 + level) * weight``, f32 ``[CHANNELS, HEADS]``.

    Args:
        words: pointers i32 ``[CHANNELS, 8]`` into plane 0.
        table: of the lookup.
        weights: B operands of the page's 16 subsets.
    """
    PLANE: gl.constexpr = 8 * D
    sums = gl.zeros([CHANNELS, HEADS], gl.float32, MMA)
    first = gl.load(words)
    second = gl.load(words + PLANE)
    if BITS == 2:
        sums = _add_group(sums, first, table, weights, 0, 0, BITS)
        sums = _add_group(sums, first, table, weights, 4, 1, BITS)
        sums = _add_group(sums, second, table, weights, 8, 0, BITS)
        sums = _add_group(sums, second, table, weights, 12, 1, BITS)
    else:
        third = gl.load(words + 2 * PLANE)
        sums = _add_group(sums, first, table, weights, 0, 0, BITS)
        sums = _add_group(sums, second, table, weights, 4, 0, BITS)
        sums = _add_group(sums, third, table, weights, 8, 0, BITS)
        fourth = spare_words(first, second, third) if BITS == 3 else gl.load(words + 3 * PLANE)
        sums = _add_group(sums, fourth, table, weights, 12, 0, BITS)
    return sums
