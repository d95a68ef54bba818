"""Small Triton kernels whose code is easy to foresee."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nested_sums(
    numbers, sums, weights, rows, stride, SIZE: tl.constexpr, SQUARE_ROOTS: tl.constexpr
):
    """A loop in a loop, with more work in the inner one where SQUARE_ROOTS."""
    place = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for row in range(rows):
        inner = tl.zeros([SIZE], tl.float32)
        for column in range(row):
            number = tl.load(numbers + (row * stride + column) * SIZE + place)
            if SQUARE_ROOTS:
                number = tl.sqrt(number)
            inner += number
        if weights is not None:
            inner *= tl.load(weights + row)
        total = total * 0.5 + inner
    tl.store(sums + place, total)


@triton.jit
def many_sums(numbers, sums, rows, SIZE: tl.constexpr):
    """As many numbers a thread as its share of SIZE, all alive through the loop."""
    place = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for row in range(rows):
        number = tl.load(numbers + row * SIZE + place)
        total += number / (1 + tl.abs(total))
    tl.store(sums + place, total)
