"""Matrix instructions against fragments as the ISA draws them, thread by thread."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_machine import MachineError
from ptx_machine.floats import to_bf16
from ptx_machine.snippets import each

Array = np.ndarray
GENERATOR = np.random.default_rng(5)


def integers(*shape: int) -> Array:
    """Small ones: sums are exact whatever the order."""
    return GENERATOR.integers(-8, 9, shape).astype(np.float32)


def packed(lower: float, upper: float, kind: str) -> int:
    pair = np.array([lower, upper], np.float32)
    halves = pair.astype(np.float16).view(np.uint16) if kind == "f16" else to_bf16(pair)
    return int(halves[0]) | int(halves[1]) << 16


def bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


def fragments_16_bits(A: Array, B: Array, kind: str) -> tuple[list[Array], list[Array]]:
    """Registers of A ``[16, K]`` and B ``[K, 8]``: halves of neighbouring k."""
    blocks = A.shape[1] // 8
    a, b = np.zeros((2 * blocks, 32), np.uint32), np.zeros((blocks, 32), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for block in range(blocks):
            k = 2 * t + 8 * block
            a[2 * block, lane] = packed(A[g, k], A[g, k + 1], kind)
            a[2 * block + 1, lane] = packed(A[g + 8, k], A[g + 8, k + 1], kind)
            b[block, lane] = packed(B[k, g], B[k + 1, g], kind)
    return list(a), list(b)


def accumulators(C: Array) -> list[Array]:
    """Registers of C ``[16, 8]``, f32."""
    c = np.zeros((4, 32), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        c[0, lane], c[1, lane] = bits(C[g, 2 * t]), bits(C[g, 2 * t + 1])
        c[2, lane], c[3, lane] = bits(C[g + 8, 2 * t]), bits(C[g + 8, 2 * t + 1])
    return list(c)


def multiply(shape: str, types: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """Registers of D. All inputs go through one array of 64 bits a pair of registers."""
    registers = [*a, *b, *c]
    if len(registers) % 2:
        registers.append(np.zeros(32, np.uint32))
    pairs = [
        low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        for low, high in zip(registers[::2], registers[1::2], strict=True)
    ]
    unpack = "".join(
        f"mov.b64 {{%r{2 * i}, %r{2 * i + 1}}}, %{letter};"
        for i, letter in zip(range(len(pairs)), "abcdefgh", strict=False)
    )
    names = iter(range(len(registers)))

    def take(count: int) -> str:
        return "{" + ", ".join(f"%r{next(names)}" for _ in range(count)) + "}"

    of = ", ".join(take(len(x)) for x in (a, b, c))
    into = "{" + ", ".join(["%x", "%y", "%z", "%u"][: len(c)]) + "}"
    line = f"mma.sync.aligned.{shape}.row.col.{types} {into}, {of};"
    return each(unpack + line, *pairs, results=[32] * len(c))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("depth", [8, 16])
def test_products_of_halves(kind: str, depth: int) -> None:
    A, B, C = integers(16, depth), integers(depth, 8), integers(16, 8) / 4
    a, b = fragments_16_bits(A, B, kind)
    found = multiply(f"m16n8k{depth}", f"f32.{kind}.{kind}.f32", a, b, accumulators(C))
    expected = accumulators(A @ B + C)
    for got, want in zip(found, expected, strict=True):
        assert (got == want).all()


def test_halves_as_accumulators() -> None:
    A, B, C = integers(16, 16), integers(16, 8), integers(16, 8)

    def halves(D: Array) -> list[Array]:
        d = np.zeros((2, 32), np.uint32)
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for half in range(2):
                row = g + 8 * half
                d[half, lane] = packed(D[row, 2 * t], D[row, 2 * t + 1], "f16")
        return list(d)

    a, b = fragments_16_bits(A, B, "f16")
    found = multiply("m16n8k16", "f16.f16.f16.f16", a, b, halves(C))
    assert all((g == w).all() for g, w in zip(found, halves(A @ B + C), strict=True))


@pytest.mark.parametrize("depth", [4, 8])
def test_products_of_tf32(depth: int) -> None:
    A, B, C = integers(16, depth), integers(depth, 8), integers(16, 8)
    blocks = depth // 4
    a, b = np.zeros((2 * blocks, 32), np.uint32), np.zeros((blocks, 32), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for block in range(blocks):
            # What is below tf32 is not looked at.
            a[2 * block, lane] = bits(A[g, t + 4 * block]) | 0x1FFF
            a[2 * block + 1, lane] = bits(A[g + 8, t + 4 * block])
            b[block, lane] = bits(B[t + 4 * block, g])
    found = multiply(f"m16n8k{depth}", "f32.tf32.tf32.f32", list(a), list(b), accumulators(C))
    for got, want in zip(found, accumulators(A @ B + C), strict=True):
        assert (got == want).all()


def test_products_of_bytes() -> None:
    A = GENERATOR.integers(-128, 128, (16, 32))
    B = GENERATOR.integers(0, 256, (32, 8))
    C = GENERATOR.integers(-1000, 1000, (16, 8))
    a, b = np.zeros((4, 32, 4), np.uint8), np.zeros((2, 32, 4), np.uint8)
    c, expected = np.zeros((4, 32), np.int32), np.zeros((4, 32), np.int32)
    D = A @ B + C
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(4):
            a[0, lane, i], a[1, lane, i] = A[g, 4 * t + i] % 256, A[g + 8, 4 * t + i] % 256
            a[2, lane, i], a[3, lane, i] = (
                A[g, 4 * t + i + 16] % 256,
                A[g + 8, 4 * t + i + 16] % 256,
            )
            b[0, lane, i], b[1, lane, i] = B[4 * t + i, g], B[4 * t + i + 16, g]
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            c[i, lane], expected[i, lane] = C[row, column], D[row, column]
    first = [x.view(np.uint32)[:, 0] for x in a]
    second = [x.view(np.uint32)[:, 0] for x in b]
    found = multiply("m16n8k32", "s32.s8.u8.s32", first, second, list(c.view(np.uint32)))
    assert all((g.view(np.int32) == w).all() for g, w in zip(found, expected, strict=True))


SHARED = ".extern .shared .align 16 .b8 memory[];"
FILL = """mov.u32 %r0, memory; shl.b32 %r1, %laneid, 4; add.s32 %r2, %r0, %r1;
st.shared.v2.b64 [%r2], {%a, %b}; bar.sync 0;"""
"""Row ``lane`` of 16 bytes in shared memory."""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    halves = np.arange(256, dtype=np.uint16).reshape(32, 8)
    rows = halves.view(np.uint64)
    into = "{" + ", ".join(["%x", "%y", "%z", "%u"][:count]) + "}"
    turn = ".trans" * transposed
    body = f"{FILL} ldmatrix.sync.aligned.m8n8.x{count}{turn}.shared.b16 {into}, [%r2+0];"
    found = each(
        body, rows[:, 0].copy(), rows[:, 1].copy(), results=[32] * count, declarations=SHARED,
        shared_bytes=512,
    )  # fmt: skip
    for matrix, got in enumerate(found):
        square = halves[8 * matrix : 8 * matrix + 8]
        square = square.T if transposed else square
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            pair = int(square[row, column]) | int(square[row, column + 1]) << 16
            assert int(got[lane]) == pair


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(transposed: str) -> None:
    rows = np.arange(64, dtype=np.uint64).reshape(32, 2) * np.uint64(0x9E3779B97F4A7C15)
    body = f"""{FILL}
    ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r2];
    bar.sync 0;
    st.shared.v2.b64 [%r2], {{0, 0}};
    stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 [%r2], {{%r4, %r5, %r6, %r7}};
    bar.sync 0;
    ld.shared.v2.b64 {{%x, %y}}, [%r2];"""
    found = each(
        body, rows[:, 0].copy(), rows[:, 1].copy(), results=[64, 64], declarations=SHARED,
        shared_bytes=512,
    )  # fmt: skip
    assert (np.stack(found, axis=1) == rows).all()


def test_movmatrix() -> None:
    square = np.arange(64, dtype=np.uint16).reshape(8, 8)
    (found,) = each(
        "movmatrix.sync.aligned.m8n8.trans.b16 %x, %a;", square.view(np.uint32).reshape(32).copy()
    )
    assert (found.view(np.uint16).reshape(8, 8) == square.T).all()


def test_a_part_of_a_warp_is_refused() -> None:
    a = np.arange(32, dtype=np.uint32)
    with pytest.raises(MachineError, match="movmatrix"):
        each("setp.lt.u32 %p1, %a, 9; @%p1 movmatrix.sync.aligned.m8n8.trans.b16 %x, %a;", a)
