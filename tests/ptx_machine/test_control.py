"""Branches, loops, barriers, orders, and how text is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx_machine import MachineError, run
from ptx_machine.snippets import each, module

LANE = np.arange(32, dtype=np.uint32)
SHARED = ".extern .shared .align 16 .b8 memory[];"


def test_threads_meet_behind_a_branch() -> None:
    body = """
    setp.lt.u32 %p1, %a, 7;
    @%p1 bra LOW;
    mov.u32 %x, 1;
    bra.uni JOIN;
LOW:
    mov.u32 %x, 2;
JOIN:
    redux.sync.add.u32 %y, %a, -1;"""
    chosen, total = each(body, LANE, results=[32, 32])
    assert chosen.tolist() == [2] * 7 + [1] * 25
    assert (total == 496).all()


def test_loops_of_different_lengths() -> None:
    body = """
    mov.u32 %x, 0; mov.u32 %r1, 0;
$L__loop:
    setp.ge.u32 %p1, %r1, %a;
    @%p1 bra $L__end;
    add.s32 %x, %x, %r1; add.s32 %r1, %r1, 1;
    setp.ne.b32 %p2, %r1, 1000;
    @%p2 bra $L__loop;
$L__end:
    shfl.sync.down.b32 %y, %x, 1, 31, -1;"""
    total, neighbour = each(body, LANE, results=[32, 32])
    sums = [lane * (lane - 1) // 2 for lane in range(32)]
    assert total.tolist() == sums
    assert neighbour.tolist() == [*sums[1:], sums[-1]]


def test_threads_that_end_early() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    text = module(
        """ld.param.b64 %rd0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd1, %r0, 4, %rd0;
        setp.ge.u32 %p1, %r0, 40; @%p1 ret;
        bar.sync 0;
        mov.u32 %r2, 0; vote.sync.ballot.b32 %r2, %p1, -1;
        st.global.b32 [%rd1], 5;""",
        parameters=1,
    )
    issued = run(text, grid=(1,), threads=64, arguments=[out], shared_bytes=0)
    assert out.tolist() == [5] * 40 + [0] * 24
    assert issued["st.global.b32"] == issued["bar.sync"] == 2


EXCHANGE = """mov.u32 %r0, memory; mad.lo.u32 %r1, %r79, 4, %r0; xor.b32 %r2, %r79, 32;
mad.lo.u32 %r3, %r2, 4, %r0; st.shared.b32 [%r1], %a; {barrier} ld.shared.b32 %x, [%r3];"""


def test_a_missing_barrier_shows() -> None:
    a = np.arange(64, dtype=np.uint32)
    for order in ("forward", "backward"):
        how = {"declarations": SHARED, "shared_bytes": 256, "order": order, "races": False}
        (found,) = each(EXCHANGE.format(barrier="bar.sync 0;"), a, **how)  # type: ignore[arg-type]
        assert found.tolist() == [*range(32, 64), *range(32)]
        (found,) = each(EXCHANGE.format(barrier=""), a, **how)  # type: ignore[arg-type]
        early = slice(0, 32) if order == "forward" else slice(32, 64)
        assert (found[early] == 2**32 - 1).all()


def test_barriers_that_not_all_reach() -> None:
    a = np.arange(64, dtype=np.uint32)
    divided = "setp.lt.u32 %p1, %a, 9; @%p1 bra END; bar.sync 0; END: mov.u32 %x, 0;"
    with pytest.raises(MachineError, match="only threads"):
        each(divided, a)
    other = "setp.lt.u32 %p1, %a, 32; @%p1 bra L; bar.sync 1; L: bar.sync 2; mov.u32 %x, 0;"
    with pytest.raises(MachineError, match="wait for each other"):
        each(other, a)
    named = "setp.lt.u32 %p1, %a, 32; @%p1 bra L; bar.sync 1, 32; L: bar.sync 0; mov.u32 %x, 3;"
    assert (each(named, a)[0] == 3).all()


def test_ctas_run_in_order() -> None:
    for order, expected in (("forward", [3, 2]), ("backward", [0, 0])):
        out = torch.zeros(2, dtype=torch.int32)
        text = module(
            """ld.param.b64 %rd0, [p0]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y;
            st.global.b32 [%rd0], %r0; st.global.b32 [%rd0+4], %r1;""",
            parameters=1,
        )
        how = {"order": order, "races": False}
        run(text, grid=(4, 3), threads=32, arguments=[out], shared_bytes=0, **how)  # type: ignore[arg-type]
        assert out.tolist() == expected


def test_a_loop_without_an_end() -> None:
    text = module("AGAIN: bra AGAIN;", parameters=0)
    with pytest.raises(MachineError, match="without an end"):
        run(text, grid=(1,), threads=32, arguments=[], shared_bytes=0, limit=100)


def test_names_in_braces_are_their_own() -> None:
    body = """
    { .reg .b32 t, %x0; mov.u32 t, 5; mov.u32 %x0, 1; add.s32 %x, t, %x0; }
    // begin inline asm
    { .reg .b32 t; .reg .b16 lo, hi; mov.b32 {lo, hi}, %a; mov.b32 t, {hi, lo};
      { .reg .b16 lo; mov.b16 lo, 3; mov.b32 {_, lo}, t; cvt.u32.u16 %z, lo; }
      mov.b32 %y, t; }
    // end inline asm"""
    found = each(body, np.full(32, 0x00020001, np.uint32), results=[32, 32, 32])
    assert [int(one[0]) for one in found] == [6, 0x00010002, 1]


def test_guards_keep_what_was_there() -> None:
    body = """setp.gt.u32 %p1, %a, 3; mov.u32 %x, 9; @%p1 mov.u32 %x, 1; @!%p1 add.s32 %x, %x, 1;
    mov.pred %p2, -1; @!%p2 mov.u32 %x, 0; mov.pred %p3, 0; @%p3 ld.global.b32 %x, [%rd9];"""
    assert each(body, LANE)[0].tolist() == [10] * 4 + [1] * 28


def test_debug_sections_and_places_are_left_out() -> None:
    text = module(".loc 1 2 3; mov.u32 %r1, 1;", parameters=0).replace(
        ".loc 1 2 3;", ".loc 1 2 3\n"
    )
    text = '\t.file 1 "a.py"\n' + text + ".section .debug_abbrev\n{\n.b8 1\n}\n"
    run(text, grid=(1,), threads=32, arguments=[], shared_bytes=0)


@pytest.mark.parametrize(
    "text",
    [
        ".func f() { ret; }", "", ".visible .entry a() { ret; } .visible .entry b() { ret; }",
        ".visible .entry a(.param .align 8 .b8 x[16]) { ret; }", ".visible .entry a() { ret;",
    ],
)  # fmt: skip
def test_modules_of_another_kind_are_refused(text: str) -> None:
    with pytest.raises(NotImplementedError):
        run(text.replace("{", "\n{"), grid=(1,), threads=32, arguments=[], shared_bytes=0)
