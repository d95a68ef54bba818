"""Running sums over the outliers of a page, by matrix instructions: no lane walks a run.

Every lane has the same number of entries, next to each other, wherever tokens or channels end; what
a token or a channel adds up to is the difference of two running sums. Lanes 4 r to 4 r + 3 are rows
r and r + 8 of a left factor, 16 rows by 4 lanes by 4 heads: row r the first half of each lane's
entries, one a product, row r + 8 the second (PTX ISA, mma.m16n8k16). A right factor of ones and
zeros (``selector``) adds lanes or keeps them apart, so that products add up in f32 what lanes have
multiplied in f16, and no lane converts, adds or waits for another's number.
"""
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvq_kernels.nvidia.entry_counts import chunks, steps

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Its name in Triton 3.6."""


@gluon.constexpr_function
def lane_rows(warps):
    """Four heads a lane, ``[32 warps, 4]``."""
    return gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0])


@gluon.constexpr_function
def products(warps):
    """Layout of sums, ``[16 warps, 16]``; column ``4 t + g``: lane t of a row's four, head g."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.jit
def selector(SIGN: gl.constexpr, WARPS: gl.constexpr):
    """Right factor f16 ``[16, 16]``: 1 for a lane and those before it, or -1 for the lane only."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(1, products(WARPS), 2)
    place = gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    chosen = (column & 3) == (place & 1) + ((place >> 3) << 1)
    lane, upto = (place >> 1) & 3, column >> 2
    if SIGN > 0:
        chosen &= lane <= upto
    else:
        chosen &= lane == upto
    return gl.where(chosen, 1.0 * SIGN, 0.0).to(gl.float16)


@gluon.jit
def as_operand(first, second, WARPS: gl.constexpr):
    """Left factor f16 ``[16 WARPS, 16]`` of two entries of each lane, ``[32 WARPS, 4]``."""
    x = gl.join(first, second).reshape([WARPS, 8, 4, 2, 2, 2]).permute([0, 5, 1, 3, 2, 4])
    return gl.convert_layout(
        x.reshape([16 * WARPS, 16]), gl.DotOperandLayout(0, products(WARPS), 2), assert_trivial=True
    )


@gluon.jit
def _ends_of_shares(total):
    """Sums of all that comes before, and of the share itself, of a lane's first and second half.

    ``total`` f32 ``[16 WARPS, 16]``: sums of each row, up to and with each lane.
    """
    # Packs of eight: of row r, then r + 8, columns 2 c and 2 c + 1; then columns 8 further, which
    # are lanes two further. Last columns of r and r + 8 (in lanes c = 2, 3) are sums of the rows.
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 s0, s1, u0, u1, a0, a1, b0, b1;
        .reg .pred p, upper;
        add.f32 s0, $12, $14;
        add.f32 s1, $13, $15;
        shfl.sync.up.b32 u0|p, s0, 4, 0, -1;
        @p add.f32 s0, s0, u0;
        shfl.sync.up.b32 u1|p, s1, 4, 0, -1;
        @p add.f32 s1, s1, u1;
        shfl.sync.up.b32 u0|p, s0, 8, 0, -1;
        @p add.f32 s0, s0, u0;
        shfl.sync.up.b32 u1|p, s1, 8, 0, -1;
        @p add.f32 s1, s1, u1;
        shfl.sync.up.b32 u0|p, s0, 16, 0, -1;
        @p add.f32 s0, s0, u0;
        shfl.sync.up.b32 u1|p, s1, 16, 0, -1;
        @p add.f32 s1, s1, u1;
        shfl.sync.up.b32 u0|p, s0, 4, 0, -1;
        selp.f32 u0, u0, 0f00000000, p;
        shfl.sync.up.b32 u1|p, s1, 4, 0, -1;
        selp.f32 u1, u1, 0f00000000, p;
        shfl.sync.idx.b32 u0, u0, 2, 0x1d1f, -1;
        shfl.sync.idx.b32 u1, u1, 2, 0x1d1f, -1;
        shfl.sync.up.b32 a0|upper, $10, 2, 0x1c00, -1;
        selp.f32 a0, a0, 0f00000000, upper;
        shfl.sync.up.b32 a1, $11, 2, 0x1c00, -1;
        selp.f32 a1, a1, 0f00000000, upper;
        selp.f32 b0, $10, $14, upper;
        selp.f32 b1, $11, $15, upper;
        shfl.sync.bfly.b32 b0, b0, 2, 0x1f, -1;
        shfl.sync.bfly.b32 b1, b1, 2, 0x1f, -1;
        add.f32 s0, $8, u0;
        add.f32 s1, $9, u1;
        add.f32 u0, $12, u0;
        add.f32 u1, $13, u1;
        add.f32 $0, s0, a0;
        add.f32 $1, s1, a1;
        add.f32 $2, s0, $10;
        add.f32 $3, s1, $11;
        add.f32 $4, u0, b0;
        add.f32 $5, u1, b1;
        add.f32 $6, u0, $14;
        add.f32 $7, u1, $15;
        }""",
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=8,
    )


@gluon.jit
def running_sums(
    xs,
    upto,
    minus_own,
    sums,
    first,
    CAPACITY: gl.constexpr,
    WIDTH: gl.constexpr,
    SLOTS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Write the sums of a chunk's entries to ``sums`` f32 ``[WARPS, SLOTS, WIDTH]``, four heads.

    Args:
        xs: left factors of the chunk (``as_operand``).
        upto, minus_own: right factors (``selector``).
        sums: a place is the sum of all entries before; place 0 is 0 already.
        first: the chunk's first entry.
    """
    LAYOUT: gl.constexpr = products(WARPS)
    STEPS: gl.constexpr = steps(CAPACITY)
    FIRST: gl.constexpr = (STEPS + 1) // 2
    row = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    second = (row >> 3) & 1
    begin = sums + ((row // 16) * SLOTS + first) * WIDTH + column % 4
    place = ((row & 7) * 4 + column // 4) * STEPS + second * FIRST
    total = gl.zeros([16 * WARPS, 16], gl.float32, layout=LAYOUT)
    for i in gl.static_range(FIRST):
        total = mma_v2(xs[i], upto, total)
    total = _ends_of_shares(total)
    if chunks(CAPACITY) > 1:
        total += gl.load(begin)
    # Backwards, so that what the lanes before add up to is in already.
    for i in gl.static_range(FIRST):
        inside = FIRST - i <= gl.where(second > 0, STEPS // 2, FIRST)
        gl.store(begin + (place + (FIRST - i)) * WIDTH, total, mask=inside)
        if i + 1 < FIRST:
            total = mma_v2(xs[FIRST - 1 - i], minus_own, total)
