"""Arithmetic on two f16 in one register, and their way into matrix operands.

Tensors are f16 whose neighbours share a register, or i32 that hold two f16 each.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _pack(dtype):
    """Elements of a register."""
    return 2 if dtype == gl.float16 else 1


@gluon.jit
def multiply(a, b):
    """``a * b``."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=a.dtype, is_pure=True,
        pack=_pack(a.dtype),
    )  # fmt: skip


@gluon.jit
def multiply_negated(a, b):
    """``-a * b``."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 n; neg.f16x2 n, $1; mul.rn.f16x2 $0, n, $2; }", "=r,r,r", [a, b],
        dtype=a.dtype, is_pure=True, pack=_pack(a.dtype),
    )  # fmt: skip


@gluon.jit
def multiply_add(a, b, c):
    """``a * b + c``, rounded once."""
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=a.dtype, is_pure=True,
        pack=_pack(a.dtype),
    )  # fmt: skip


@gluon.jit
def multiply_subtract(a, b, c):
    """``a * b - c``, rounded once."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 n; neg.f16x2 n, $3; fma.rn.f16x2 $0, $1, $2, n; }", "=r,r,r,r", [a, b, c],
        dtype=a.dtype, is_pure=True, pack=_pack(a.dtype),
    )  # fmt: skip


@gluon.jit
def to_floats(pair):
    """Both numbers, f32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
        "=f,=f,r",
        [pair],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def to_operand(pairs, layout: gl.constexpr):
    """i32 ``[M, K / 2]`` as f16 ``[M, K]`` in the layout of a matrix operand; nothing moves."""
    lower, upper = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;",
        "=h,=h,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
    numbers = gl.reshape(gl.join(lower, upper), [pairs.shape[0], 2 * pairs.shape[1]])
    return gl.convert_layout(numbers, layout, assert_trivial=True)
