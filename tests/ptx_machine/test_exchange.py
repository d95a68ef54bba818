"""What threads of a warp tell each other, against the ISA's own pseudo-code."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_machine import MachineError
from ptx_machine.snippets import each

LANE = np.arange(32, dtype=np.uint32)
VALUE = LANE * np.uint32(1000003)


def shuffled(mode: str, by: int, clamp: int) -> tuple[list[int], list[int]]:
    """PTX ISA 8.7, 9.7.9.6."""
    values, found = [], []
    for lane in range(32):
        offset, segment, limit = by & 31, clamp >> 8 & 31, clamp & 31
        last = (lane & segment) | (limit & ~segment & 31)
        first = lane & segment
        if mode == "up":
            j = lane - offset
            inside = j >= last
        elif mode == "down":
            j = lane + offset
            inside = j <= last
        elif mode == "bfly":
            j = lane ^ offset
            inside = j <= last
        else:
            j = first | (offset & ~segment & 31)
            inside = j <= last
        values.append(int(VALUE[j if inside else lane]))
        found.append(int(inside))
    return values, found


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("clamp", [31, 0, 0x1807, 0x181F, 0x1C03])
def test_shfl(mode: str, clamp: int) -> None:
    for by in (0, 1, 3, 8, 16, 31):
        body = f"""shfl.sync.{mode}.b32 %x|%p1, %a, {by}, {clamp}, -1; selp.b32 %y, 1, 0, %p1;
                   shfl.sync.{mode}.b32 %z, %a, %b, {clamp}, 0xffffffff;"""
        value, found, same = each(body, VALUE, np.full(32, by, np.uint32), results=[32] * 3)
        expected = shuffled(mode, by, clamp)
        assert (value.tolist(), found.tolist()) == expected
        assert same.tolist() == expected[0]


def test_shfl_to_each_its_own() -> None:
    (found,) = each("shfl.sync.idx.b32 %x, %a, %b, 31, -1;", VALUE, LANE * np.uint32(7))
    assert found.tolist() == [int(VALUE[lane * 7 % 32]) for lane in range(32)]


def test_votes_and_reductions() -> None:
    signed = (LANE.astype(np.int32) * 37 % 64 - 30).view(np.uint32)
    body = """setp.lt.s32 %p1, %a, 0; vote.sync.ballot.b32 %x, %p1, -1;
              vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, !%p1, -1;
              selp.b32 %y, 1, 0, %p2; selp.b32 %z, 1, 0, %p3;
              redux.sync.min.s32 %u, %a, -1; redux.sync.add.s32 %v, %a, -1;
              redux.sync.max.u32 %w, %a, -1;"""
    found = each(body, signed, results=[32] * 6)
    numbers = signed.view(np.int32)
    expected = [
        sum(1 << lane for lane in range(32) if numbers[lane] < 0), 1, 0,
        int(numbers.min()) % 2**32, int(numbers.sum()) % 2**32, int(signed.max()),
    ]  # fmt: skip
    for got, want in zip(found, expected, strict=True):
        assert (got == want).all()


def test_matches_and_active_threads() -> None:
    body = """match.any.sync.b32 %x, %a, -1; setp.lt.u32 %p1, %b, 5; mov.u32 %y, 0;
              @%p1 activemask.b32 %y;"""
    same, active = each(body, LANE % np.uint32(3), LANE, results=[32, 32])
    classes = [sum(1 << lane for lane in range(32) if lane % 3 == rest) for rest in range(3)]
    assert same.tolist() == [classes[lane % 3] for lane in range(32)]
    assert active.tolist() == [31] * 5 + [0] * 27


@pytest.mark.parametrize(
    "line",
    [
        "@%p1 shfl.sync.bfly.b32 %x, %a, 1, 31, -1;",
        "@%p1 shfl.sync.bfly.b32 %x, %a, 1, 31, 0xFF;",
        "@%p1 redux.sync.add.s32 %x, %a, -1;",
        "@%p1 bar.warp.sync -1;",
        "shfl.sync.bfly.b32 %x, %a, 1, 31, 0xFF;",
    ],
)
def test_all_named_threads_have_to_come(line: str) -> None:
    with pytest.raises(MachineError, match="threads"):
        each(f"setp.lt.u32 %p1, %a, 5; {line}", LANE)


def test_a_mask_of_those_that_come() -> None:
    body = "mov.u32 %x, 7; setp.lt.u32 %p1, %a, 8; @%p1 redux.sync.add.u32 %x, %a, 0xFF;"
    assert each(body, LANE)[0].tolist() == [28] * 8 + [7] * 24
