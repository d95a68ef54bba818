"""Global and shared memory: what may be touched, and how."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx_machine import MemoryAccessError, run
from ptx_machine.snippets import each, module

LANE = np.arange(32, dtype=np.uint32)
SHARED = ".extern .shared .align 16 .b8 memory[];"


def go(body: str, *tensors: torch.Tensor, **how: object) -> None:
    loads = "".join(f"ld.param.b64 %rd{i}, [p{i}];" for i in range(len(tensors)))
    text = module(f"{loads} mov.u32 %r0, %tid.x;\n{body}", parameters=len(tensors))
    run(text, grid=(1,), threads=32, arguments=tensors, shared_bytes=0, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [-4, 128, 2**40])
@pytest.mark.parametrize("access", ["ld.global.b32 %r1, [%rd2];", "st.global.b32 [%rd2], %r0;"])
def test_touches_outside_are_errors(access: str, offset: int) -> None:
    around = torch.zeros(96, dtype=torch.int32)
    inside, other = around[32:64], torch.zeros(5)
    go(f"mad.wide.u32 %rd2, %r0, 4, %rd0; {access}", inside, other)
    body = f"mad.wide.u32 %rd2, %r0, 4, %rd0; add.s64 %rd2, %rd2, {offset};\n{access}"
    with pytest.raises(MemoryAccessError, match=r"nearest is (p0|p1).*line \d+: (ld|st)\.global"):
        go(body, inside, other)
    # Of threads that are masked out nothing is looked at.
    go("setp.lt.u32 %p1, %r0, 0;" + body.replace("\n", "\n@%p1 "), inside, other)


def test_no_access_may_straddle_the_end() -> None:
    tensor = torch.zeros(31, dtype=torch.int32)
    with pytest.raises(MemoryAccessError, match="16 bytes"):
        go(
            "and.b32 %r0, %r0, 7; mad.wide.u32 %rd2, %r0, 16, %rd0;"
            "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];",
            tensor,
        )


def test_addresses_are_multiples_of_what_is_moved() -> None:
    tensor = torch.zeros(64, dtype=torch.int32)
    for line in ("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", "st.global.b64 [%rd0+4], %rd0;"):
        with pytest.raises(MemoryAccessError, match="no multiple of 8"):
            go(line, tensor)


def test_read_only_tensors() -> None:
    tensor = torch.arange(32, dtype=torch.int32)
    go("ld.global.b32 %r1, [%rd0];", tensor, read_only=[tensor])
    with pytest.raises(MemoryAccessError, match="only read"):
        go("st.global.b32 [%rd0], %r0;", tensor, read_only=[tensor])


def test_strides_and_offsets() -> None:
    """A view may be touched from its first element to its last, whatever lies between."""
    base = torch.arange(100, dtype=torch.int16)
    view, out = base[3:99:3], torch.zeros(32, dtype=torch.int32)
    go(
        "mad.wide.u32 %rd2, %r0, 6, %rd0; ld.global.s16 %r1, [%rd2];"
        "mad.wide.u32 %rd3, %r0, 4, %rd1; st.global.b32 [%rd3], %r1;",
        view, out,
    )  # fmt: skip
    assert out.tolist() == list(range(3, 99, 3))
    with pytest.raises(MemoryAccessError):
        go("ld.global.b16 %rs1, [%rd0+190];", view)


def test_threads_in_several_tensors() -> None:
    a, b, out = torch.full((32,), 5), torch.full((32,), 6), torch.zeros(32, dtype=torch.int64)
    go(
        "setp.lt.u32 %p1, %r0, 9; selp.b64 %rd3, %rd0, %rd1, %p1; ld.global.b64 %rd4, [%rd3+8];"
        "mad.wide.u32 %rd5, %r0, 8, %rd2; st.global.b64 [%rd5], %rd4; st.global.b64 [%rd3], %rd5;",
        a, b, out,
    )  # fmt: skip
    assert out.tolist() == [5] * 9 + [6] * 23
    assert a[0] == out.data_ptr() + 8 * 8
    assert b[0] == out.data_ptr() + 8 * 31


def test_narrow_numbers_are_extended_and_cut() -> None:
    word = np.full(32, 0x8182FEFF, np.uint32)
    body = """mov.u32 %r0, memory; mad.lo.u32 %r1, %laneid, 4, %r0; st.shared.b32 [%r1], %a;
    ld.shared.u8 %x, [%r1]; ld.shared.s8 %y, [%r1+1]; ld.shared.s16 %z, [%r1+2];
    ld.shared.b8 %rs1, [%r1+3]; cvt.u32.u16 %u, %rs1; st.shared.b8 [%r1+1], %a;
    ld.shared.b32 %v, [%r1];"""
    found = each(body, word, results=[32] * 5, declarations=SHARED, shared_bytes=128)
    assert [int(one[0]) for one in found] == [0xFF, 0xFFFFFFFE, 0xFFFF8182, 0x81, 0x8182FFFF]


def test_vectors() -> None:
    a = torch.arange(128, dtype=torch.int32)
    out = torch.zeros(128, dtype=torch.int32)
    go(
        "mad.wide.u32 %rd2, %r0, 16, %rd0; mad.wide.u32 %rd3, %r0, 16, %rd1;"
        "ld.global.L1::evict_first.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];"
        "st.global.v2.b32 [%rd3], {%r4, %r3}; st.global.v2.b32 [%rd3+8], {%r2, %r1};",
        a, out,
    )  # fmt: skip
    assert out.view(32, 4).tolist() == a.view(32, 4).flip(1).tolist()


def test_shared_memory_starts_as_nan_and_has_bounds() -> None:
    body = "mov.u32 %r0, memory; ld.shared.b32 %x, [%r0+124];"
    (found,) = each(body, LANE, declarations=SHARED, shared_bytes=128)
    assert np.isnan(found.view(np.float32)).all()
    with pytest.raises(MemoryAccessError, match="shared memory"):
        each(body.replace("124", "128"), LANE, declarations=SHARED, shared_bytes=128)


def test_constant_data() -> None:
    table = ".global .align 4 .b32 table[3] = {7, 0x10, -1};"
    body = """mov.u64 %rd1, table; ld.global.b32 %x, [%rd1+4]; ld.global.s32 %rd2, [%rd1+8];
    cvt.u32.u64 %y, %rd2;"""
    found = each(body, LANE, results=[32, 32], declarations=table)
    assert [int(one[0]) for one in found] == [16, 2**32 - 1]
    with pytest.raises(MemoryAccessError, match="only read"):
        each(
            "mov.u64 %rd1, table; st.global.b32 [%rd1], %a; mov.u32 %x, 0;",
            LANE,
            declarations=table,
        )


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_several_stores_to_one_place(order: str) -> None:
    body = "mov.u32 %r0, memory; st.shared.b32 [%r0], %a; ld.shared.b32 %x, [%r0];"
    how = {"declarations": SHARED, "shared_bytes": 16, "order": order, "races": False}
    (found,) = each(body, LANE, **how)  # type: ignore[arg-type]
    assert (found == (31 if order == "forward" else 0)).all()


def test_arguments() -> None:
    text = module("ld.param.b64 %rd1, [p0];", parameters=1).replace(
        ".param .u64 p0", ".param .u64 p0, .param .u8 p1, .param .f32 p2, .param .u32 p3"
    )
    how = {"grid": (1,), "threads": 32, "shared_bytes": 0}
    tensor = torch.zeros(1)
    run(text, arguments=[tensor, True, 1.5, -1], **how)
    for wrong in (
        [tensor, 1, 1.0],
        [tensor, 256, 1.0, 0],
        [tensor, 1, 1.0, 0.5],
        [1, tensor, 1.0, 2],
    ):
        with pytest.raises(ValueError, match=r"p1|p3|arguments"):
            run(text, arguments=wrong, **how)


def test_atomics() -> None:
    total, largest = torch.zeros(2), torch.zeros(1, dtype=torch.int32)
    go(
        "setp.lt.u32 %p1, %r0, 10; cvt.rn.f32.u32 %r1, %r0;"
        "@%p1 red.global.gpu.relaxed.add.f32 [%rd0+4], %r1;"
        "atom.global.max.s32 %r2, [%rd1], %r0; atom.global.cas.b32 %r3, [%rd1], 31, 77;",
        total, largest,
    )  # fmt: skip
    assert total.tolist() == [0, 45]
    assert largest.tolist() == [77]
    body = """mov.u32 %r0, memory; st.shared.b32 [%r0], 0; bar.sync 0;
              atom.shared.add.u32 %x, [%r0], 2; ld.shared.b32 %y, [%r0];"""
    before, after = each(body, LANE, results=[32, 32], declarations=SHARED, shared_bytes=16)
    assert before.tolist() == [2 * lane for lane in range(32)]
    assert (after == 64).all()


def test_copies_arrive_when_they_are_waited_for() -> None:
    words = torch.arange(128, dtype=torch.int32)
    out = torch.zeros(96, dtype=torch.int32)
    text = module(
        """ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; mov.u32 %r0, %tid.x;
        mad.wide.u32 %rd2, %r0, 16, %rd0; mad.wide.u32 %rd3, %r0, 12, %rd1;
        mov.u32 %r1, memory; mad.lo.u32 %r1, %r0, 16, %r1;
        setp.lt.u32 %p1, %r0, 9; selp.b32 %r2, 16, 0, %p1;
        cp.async.cg.shared.global [%r1], [%rd2], 16, %r2;
        cp.async.commit_group;
        ld.shared.b32 %r3, [%r1];
        cp.async.ca.shared.global [%r1+4], [%rd0], 4;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r4, [%r1+4];
        cp.async.wait_group 0;
        ld.shared.b32 %r5, [%r1+4];
        st.global.b32 [%rd3], %r3; st.global.b32 [%rd3+4], %r4; st.global.b32 [%rd3+8], %r5;""",
        parameters=2,
        declarations=SHARED,
    )
    run(text, grid=(1,), threads=32, arguments=[words, out], shared_bytes=512)
    expected = [[-1, 4 * lane + 1 if lane < 9 else 0, 0] for lane in range(32)]
    assert out.view(32, 3).tolist() == expected
