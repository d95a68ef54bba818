"""Shares of a page's outliers: as many entries for every lane."""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_kernels.nvidia.entry_counts import steps


@gluon.jit
def entry_pointers(entries, first, lane, CAPACITY: gl.constexpr):
    """Where a lane's share of a chunk begins: of lanes whose share is all, or partly, in the pool.

    Others read what they like: entries behind the end are in no sum that is asked for.
    """
    STEPS: gl.constexpr = steps(CAPACITY)
    begin = first + lane * STEPS
    return (
        entries + gl.where(begin <= CAPACITY - STEPS, begin, 0),
        entries + gl.where(begin < CAPACITY, begin, 0),
    )


@gluon.jit
def load_entry(pointers, place: gl.constexpr, CAPACITY: gl.constexpr):
    """An entry of each lane, i32."""
    pointer = pointers[1 if place < CAPACITY % steps(CAPACITY) else 0] + place
    # A load that extends the sign; Triton's is followed by a conversion.
    return gl.inline_asm_elementwise(
        "ld.global.nc.s16 $0, [$1];",
        "=r,l",
        [pointer.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def low_bits(entry, BITS: gl.constexpr):
    """An entry's index. In PTX, or LLVM shifts for the address first, and then once more."""
    mask = (1 << BITS) - 1
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [entry, mask], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def high_bytes(first, second):
    """Two entries' residuals of eight bits, f16: bits of 1152 + residual, less 1152."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, m;
        prmt.b32 t, $2, $3, 0x5511;
        lop3.b32 t, t, 0x00ff00ff, 0x64806480, 0x6a;
        mov.b32 m, 0xe480e480;
        add.rn.f16x2 t, t, m;
        mov.b32 {$0, $1}, t;
        }""",
        "=h,=h,r,r",
        [first, second],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
