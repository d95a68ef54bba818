"""Small kernels, compiled and run on the machine; ``test_compiled.py`` starts them.

Numbers are small integers wherever sums have no order that can be relied on.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvq_kernels import decode_reference
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.decode import decode
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.phases import Phases
from packed_cases import make_case
from ptx_machine.device import Emulation
from toy_kernel import nested_sums


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("weighted", [False, True])
def test_nested_sums(weighted: bool) -> None:
    rows, stride, size = 5, 6, 64
    numbers, sums = torch.randn(rows, stride, size).abs(), torch.full((size,), torch.nan)
    weights = torch.randn(rows) if weighted else None
    nested_sums[(1,)](numbers, sums, weights, rows, stride, SIZE=size, SQUARE_ROOTS=True)
    expected = torch.zeros(size)
    for row in range(rows):
        inner = numbers[row, :row].sqrt().sum(0) if row else torch.zeros(size)
        expected = expected * 0.5 + inner * (weights[row] if weights is not None else 1)
    torch.testing.assert_close(sums, expected)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
            TURNED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``c = a b``, of b as it is or as ``[N, K]``."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, K, STEP):
        left = tl.load(a + m[:, None] * K + first + k[None, :])
        if TURNED:
            right = tl.trans(tl.load(b + n[:, None] * K + first + k[None, :]))
        else:
            right = tl.load(b + (first + k[:, None]) * N + n[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total)


@pytest.mark.parametrize(
    ("dtype", "turned", "warps", "stages", "N"),
    [
        (torch.float16, False, 4, 3, 64),
        (torch.float16, True, 4, 1, 16),
        (torch.float16, False, 1, 1, 8),
        (torch.bfloat16, True, 4, 3, 64),
        (torch.bfloat16, False, 4, 1, 16),
        (torch.float32, False, 4, 3, 64),
        (torch.float32, True, 4, 1, 16),
        (torch.float32, True, 1, 1, 8),
    ],
)
def test_products(
    dtype: torch.dtype, turned: bool, warps: int, stages: int, N: int, target: str,
    emulation: Emulation,
) -> None:  # fmt: skip
    M, K, step = (64, 256, 64) if stages > 1 else (64, 64, 64)
    a, b = integers(M, K, dtype=dtype), integers(K, N, dtype=dtype)
    c = torch.full((M, N), torch.nan)
    given = b.T.contiguous() if turned else b
    product[(1,)](
        a, given, c, M, N, K, step, turned, "tf32", num_warps=warps, num_stages=stages
    )  # fmt: skip
    assert (c == a.float() @ b.float()).all()
    (launch,) = emulation.launches
    names = " ".join(launch.instructions)
    assert ("wgmma" in names) == (target == "cuda:90" and warps == 4 and N > 8)
    assert ("cp.async.cg" in names) == (stages > 1)


@triton.jit
def scans(x, y, total, places, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    numbers = tl.load(x + i)
    tl.store(y + i, tl.cumsum(numbers, axis=0) + tl.sort(numbers))
    tl.store(places + tl.program_id(0), tl.argmax(numbers, axis=0))
    tl.atomic_add(total, tl.sum(numbers, axis=0))


def test_scans_sorts_and_atomics() -> None:
    x = integers(3, 256)
    y, total, places = torch.empty(3, 256), torch.zeros(1), torch.zeros(3, dtype=torch.int32)
    scans[(3,)](x, y, total, places, SIZE=256, num_warps=4)
    assert (y == x.cumsum(1) + x.sort(1).values).all()
    assert total.item() == x.sum().item()
    assert places.tolist() == [int((row == row.max()).nonzero()[0]) for row in x]


@triton.jit
def functions(x, y, scale, count, flag, missing, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    number = tl.load(x + i, mask=i < count, other=1.0)
    result = tl.exp(number) + tl.log2(number) * scale + tl.sqrt(number) / (1 + number)
    result += tl.sigmoid(number) + tl.floor(number) + (number > 2).to(tl.float32)
    if flag:
        result = -result
    if missing is not None:
        result += tl.load(missing)
    tl.store(y + i, result, mask=i < count)


@pytest.mark.parametrize("count", [1, 96])
def test_functions_and_arguments(count: int, emulation: Emulation) -> None:
    """Integers equal to 1, multiples of 16 and others are compiled apart, as launches do it."""
    x, y = torch.rand(128) * 4 + 0.1, torch.full((128,), torch.nan)
    functions[lambda meta: (meta["SIZE"] // 128,)](x, y, 0.7, count, True, None, SIZE=128)
    part = x[:count].double()
    expected = part.exp() + part.log2() * 0.7 + part.sqrt() / (1 + part)
    expected += part.sigmoid() + part.floor() + (part > 2)
    torch.testing.assert_close(y[:count].double(), -expected, rtol=1e-5, atol=1e-5)
    assert y[count:].isnan().all()
    assert emulation.launches[0].grid == (1,)


@gluon.jit
def gluon_product(a, b, c):
    """``c = a b`` of 16 x 16 and 16 x 8 in fragments of one warp, b through a permute of bytes."""
    made: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]
    )
    first: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=made, k_width=2)
    second: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=made, k_width=2)
    rows: gl.constexpr = gl.SliceLayout(1, first)
    left = gl.load(
        a
        + gl.arange(0, 16, rows)[:, None] * 16
        + gl.arange(0, 16, gl.SliceLayout(0, first))[None, :]
    )
    deep = gl.arange(0, 16, gl.SliceLayout(1, second))[:, None]
    right = gl.load(b + deep * 8 + gl.arange(0, 8, gl.SliceLayout(0, second))[None, :])
    negative = gl.inline_asm_elementwise(
        "{ .reg .b32 t; xor.b32 t, $1, 0x80008000; prmt.b32 $0, t, t, 0x3210; }",
        "=r,r", [right], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip
    total = mma_v2(left, negative, gl.zeros([16, 8], gl.float32, made))
    down = gl.arange(0, 16, gl.SliceLayout(1, made))[:, None]
    gl.store(c + down * 8 + gl.arange(0, 8, gl.SliceLayout(0, made))[None, :], total)


def test_gluon() -> None:
    a, b = integers(16, 16, dtype=torch.float16), integers(16, 8, dtype=torch.float16)
    c = torch.full((16, 8), torch.nan)
    gluon_product[(1,)](a, b, c, num_warps=1)
    assert (c == -(a.float() @ b.float())).all()


def test_decode(emulation: Emulation, target: str) -> None:
    """All kernels of a decode step, one after another."""
    if target != "cuda:90":
        pytest.skip("takes long to compile; tests of decode run on the machine as they are")
    case = make_case(tokens=(600, 20), key_bits=3, value_bits=2, D=32, G=3)
    tables = KernelTables.of(case.parameters, case.config, device="cpu")
    options = AttentionOptions(scaling=case.scaling)
    phases = Phases.of(case.angles, device="cpu")
    found = decode(case.query, case.rows, tables, phases, options=options)
    expected = decode_reference.decode(
        case.query.double(), case.rows, tables, case.angles, options=options
    )
    # Weights are f16.
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert len(emulation.launches) >= 3
