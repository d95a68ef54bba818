"""Scores of a page: packed keys by turned queries, 16 tokens a matrix instruction."""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvq_kernels.nvidia.half_pairs import multiply, multiply_add, multiply_subtract, to_operand
from kvq_kernels.nvidia.layouts import CHUNK, HEADS, MMA, A, key_operand
from kvq_kernels.nvidia.lookups import key_numbers, selectors, spare_words, subset_of


@gluon.jit
def _words(at, SPARE: gl.constexpr, PLANE: gl.constexpr):
    if SPARE:
        words = spare_words(gl.load(at), gl.load(at + PLANE), gl.load(at + 2 * PLANE))
    else:
        words = gl.load(at)
    return words


@gluon.jit
def load_scales(scale, zero, D: gl.constexpr):
    """Scale and zero of a chunk's channels in first and in second halves, i32 ``[1, CHUNK]``."""
    SECOND: gl.constexpr = D // 4
    return gl.load(scale), gl.load(zero), gl.load(scale + SECOND), gl.load(zero + SECOND)


@gluon.jit
def _write_group(
    group,
    words,
    offset_cos,
    offset_sin,
    table,
    scales,
    queries,
    scores,
    GROUP_OF_PLANE: gl.constexpr,
    SPARE: gl.constexpr,
    D: gl.constexpr,
    BITS: gl.constexpr,
):
    """Scores of 64 tokens, f32 ``[64, HEADS]`` in shared memory."""
    SECOND: gl.constexpr = D // 4
    offset_cos += group * (64 * SECOND)
    offset_sin += group * (64 * SECOND)
    sums = ()
    for _ in gl.static_range(4):
        sums += (gl.zeros([16, HEADS], gl.float32, MMA),)
    # A chunk at a time, so that few numbers are on their way at once.
    for chunk in gl.static_range(SECOND // CHUNK):
        first_words = _words(words + 4 * chunk, SPARE, 8 * D)
        second_words = _words(words + SECOND + 4 * chunk, SPARE, 8 * D)
        first_selector = selectors(first_words, GROUP_OF_PLANE, BITS)
        second_selector = selectors(second_words, GROUP_OF_PLANE, BITS)
        if SECOND // CHUNK > 2:
            own = load_scales(scales[0] + 4 * chunk, scales[1] + 4 * chunk, D)
        else:
            own = scales[chunk]
        first_scale, first_zero, second_scale, second_zero = own
        first_query, second_query = queries[chunk]
        added = ()
        for part in gl.static_range(2):
            firsts = key_numbers(first_words, first_selector[part], table, part, BITS)
            seconds = key_numbers(second_words, second_selector[part], table, part, BITS)
            for place in gl.static_range(2):
                angles = subset_of(part, place, BITS) * 16 * SECOND + 4 * chunk
                cos = gl.load(offset_cos + angles)
                sin = gl.load(offset_sin + angles)
                first = multiply_add(firsts[place], first_scale, first_zero)
                second = multiply_add(seconds[place], second_scale, second_zero)
                turned_first = multiply_subtract(first, cos, multiply(second, sin))
                turned_second = multiply_add(first, sin, multiply(second, cos))
                product = sums[2 * part + place]
                product = mma_v2(to_operand(key_operand(turned_first), A), first_query, product)
                product = mma_v2(to_operand(key_operand(turned_second), A), second_query, product)
                added += (product,)
        sums = added
    if BITS == 2:
        pairs = gl.join(gl.join(sums[0], sums[2]), gl.join(sums[1], sums[3]))
    else:
        pairs = gl.join(gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3]))
    scores.index(group).store(gl.reshape(gl.permute(pairs, [3, 2, 0, 1]), [64, HEADS]))


@gluon.jit
def write_page_scores(
    words, offset_cos, offset_sin, table, scales, queries, scores, D: gl.constexpr,
    BITS: gl.constexpr,
):  # fmt: skip
    """Products of a page's keys and the queries, f32 ``[4, 64, HEADS]`` in shared memory.

    Args:
        words: pointers i32 ``[16, CHUNK]``, to words of first rotary halves in plane 0.
        offset_cos, offset_sin: pointers i32 of that shape, two f16 each, at the first tokens.
        table: of the lookup.
        scales: of each chunk what ``load_scales`` gives, or, beyond two chunks, its pointers.
        queries: of each chunk B operands for first and second halves.
    """
    for plane in range(BITS):
        at = words + plane * (8 * D)
        if BITS == 2:
            for half in gl.static_range(2):
                _write_group(
                    2 * plane + half, at, offset_cos, offset_sin, table, scales, queries, scores,
                    half, False, D, BITS,
                )  # fmt: skip
        else:
            _write_group(
                plane, at, offset_cos, offset_sin, table, scales, queries, scores,
                0, False, D, BITS,
            )  # fmt: skip
    if BITS == 3:
        _write_group(
            3, words, offset_cos, offset_sin, table, scales, queries, scores, 0, True, D, BITS
        )
