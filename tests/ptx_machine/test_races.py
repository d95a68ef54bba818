"""Accesses that no barrier puts in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx_machine import RaceError, run
from ptx_machine.snippets import each, module

LANE = np.arange(32, dtype=np.uint32)
SHARED = ".extern .shared .align 16 .b8 memory[];"
START = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
add.u32 %r3, %r0, {away}; rem.u32 %r3, %r3, %r2; setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r0, 1;
"""
PLACES = {
    "global": "mad.wide.u32 %rd1, %r0, 16, %rd0; mad.wide.u32 %rd2, %r3, 16, %rd0;",
    "shared": "mov.u32 %r4, memory; mad.lo.u32 %rd1, %r0, 16, %r4; mad.lo.u32 %rd2, %r3, 16, %r4;",
}
"""A place of each thread, and of one ``away`` threads further."""


def go(
    body: str, space: str, *, away: int = 1, threads: int = 32, ctas: int = 1,
    order: str = "forward", races: bool = True,
) -> None:  # fmt: skip
    """Run a body: ``SPACE`` stands for the space, ``MINE`` and ``THEIRS`` for places."""
    places = {"global": ("%rd1", "%rd2"), "shared": ("%r5", "%r6")}[space]
    start = START.format(away=away) + PLACES[space]
    if space == "shared":
        start = start.replace("%rd1", "%r5").replace("%rd2", "%r6")
    for name, value in zip(("SPACE", "MINE", "THEIRS"), (space, *places), strict=True):
        body = body.replace(name, value)
    text = module(f"ld.param.b64 %rd0, [p0];{start}{body}", parameters=1, declarations=SHARED)
    memory = torch.zeros(threads * 4, dtype=torch.int32)
    run(
        text, grid=(ctas,), threads=threads, arguments=[memory], shared_bytes=threads * 16,
        order=order, races=races,  # type: ignore[arg-type]
    )  # fmt: skip


def refused(body: str, space: str, match: str, **how: object) -> None:
    with pytest.raises(RaceError, match=match):
        go(body, space, **how)  # type: ignore[arg-type]
    go(body, space, races=False, **how)  # type: ignore[arg-type]


STORE, LOAD = "st.SPACE.b32 [MINE], %r0;", "ld.SPACE.b32 %r7, [THEIRS];"
both = pytest.mark.parametrize("space", ["global", "shared"])


@both
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_loads_of_what_a_neighbour_stored(space: str, order: str) -> None:
    how = {"order": order}
    refused(STORE + LOAD, space, r"thread 0 of .* thread 1 of CTA 0 stored: line \d+: ld", **how)
    go(f"{STORE} bar.warp.sync -1; {LOAD}", space, order=order)
    go(f"{STORE} bar.sync 0; {LOAD}", space, order=order)
    # Votes and shuffles do not order memory.
    vote = "vote.sync.ballot.b32 %r9, %p1, -1;"
    refused(f"{STORE} {vote} {LOAD}", space, "stored", **how)


@both
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_loads_of_what_another_warp_stored(space: str, order: str) -> None:
    how = {"away": 32, "threads": 64, "order": order}
    # The warp that runs first loads before the other one stores.
    refused(STORE + LOAD, space, "loaded: .* st", **how)
    refused(f"{STORE} bar.warp.sync -1; {LOAD}", space, "loaded: .* st", **how)
    go(f"{STORE} bar.sync 0; {LOAD}", space, **how)  # type: ignore[arg-type]
    late = f"bar.warp.sync -1; {STORE}"
    refused(f"{STORE} bar.sync 0; {LOAD} {late}", space, "stored|loaded", **how)
    go(f"{STORE} bar.sync 0; {LOAD} bar.sync 0; {late}", space, **how)  # type: ignore[arg-type]


@both
def test_stores_to_what_a_neighbour_loads(space: str) -> None:
    refused(LOAD + STORE, space, "thread 0 of .* thread 31 of CTA 0 loaded: line")
    go(f"{LOAD} bar.warp.sync -1; {STORE}", space)
    # Two readers, one of which stores
    everyone = "ld.SPACE.b32 %r7, [MINE];" + LOAD
    refused(everyone + STORE, space, "threads of warp 0 of CTA 0 loaded")
    # A later reader does not hide one of the same barrier.
    later = f"{LOAD} @%p1 ld.SPACE.b32 %r7, [MINE]; @%p1 {STORE}"
    refused(later, space, "loaded")
    go(f"{LOAD} bar.warp.sync -1; ld.SPACE.b32 %r7, [MINE]; {STORE}", space)


@both
def test_threads_may_change_their_own_places(space: str) -> None:
    go(f"{STORE} ld.SPACE.b32 %r7, [MINE]; {STORE} {STORE} ld.SPACE.b32 %r7, [MINE];", space)
    # Others of the same 16 bytes are others' places.
    apart = f"and.b32 %r7, %r0, 1; {STORE} @%p1 st.SPACE.b8 [THEIRS+7], %r0; @%p2 "
    go(apart + "ld.SPACE.b8 %r8, [MINE+6];", space)
    refused(apart + "ld.SPACE.b8 %r8, [MINE+7];", space, "stored")
    refused(apart + "ld.SPACE.v2.b32 {%r8, %r9}, [MINE];", space, "byte 23 of .* stored")


def test_stores_of_two_threads_are_a_race_in_global_memory_only() -> None:
    twice = f"{STORE} st.SPACE.b32 [THEIRS], %r0;"
    refused(twice, "global", "thread 0 of .* thread 1 of CTA 0 stored: .* st")
    go(twice, "shared")
    go(f"{STORE} bar.warp.sync -1; st.SPACE.b32 [THEIRS], %r0;", "global")


def test_ctas_are_never_in_order() -> None:
    for order in ("forward", "backward"):
        how = {"ctas": 2, "order": order}
        refused(STORE, "global", "of CTA 1 touches .* of CTA 0 stored", **how)
        refused(f"{STORE} bar.sync 0;", "global", "stored", **how)
        # One stores, the other one loads
        one = """setp.eq.u32 %p3, %r1, {}; @%p3 st.global.b32 [MINE], %r0;
                 @!%p3 ld.global.b32 %r7, [MINE];"""
        refused(one.format(0), "global", "stored|loaded", **how)
        refused(one.format(1), "global", "stored|loaded", **how)
        refused(f"{LOAD} {one.format(1)}", "global", "stored|loaded", **how)
    # All load; each has shared memory of its own; launches are in order.
    go("ld.global.b32 %r7, [MINE];" + LOAD, "global", ctas=3)
    go(STORE, "shared", ctas=3)
    go(STORE, "global")


def test_several_ctas_load_before_one_stores() -> None:
    body = """setp.eq.u32 %p3, %r1, 2; @!%p3 ld.global.b32 %r7, [MINE];
              @%p3 st.global.b32 [MINE], %r0;"""
    refused(body, "global", "threads of several CTAs loaded", ctas=3)


@both
def test_atomics_are_left_out(space: str) -> None:
    add = "red.SPACE.add.u32 [THEIRS], 1;"
    go(STORE + add + "ld.SPACE.b32 %r7, [MINE];", space, ctas=1)
    go(add, space, ctas=2)


def test_prefetches_are_left_out() -> None:
    go(STORE + "prefetch.global.L1 [THEIRS];" + STORE, "global")


def test_named_barriers_order_those_that_meet() -> None:
    """A warp that has passed many is not taken for one that runs late."""
    body = f"""setp.lt.u32 %p3, %r0, 64; @%p3 bra FIRST; bra SECOND;
FIRST:
    bar.sync 1, 64; bar.sync 1, 64; {STORE}
SECOND:
    bar.sync 0; {LOAD}"""
    go(body, "global", away=32, threads=96)
    refused(body.replace("bar.sync 0;", ""), "global", "stored|loaded", away=32, threads=96)


def test_matrices() -> None:
    row = "mov.u32 %r0, memory; mad.lo.u32 %r1, %laneid, 16, %r0;"
    fill = "st.shared.v4.b32 [%r1], {%a, %a, %a, %a};"
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%x, %r3, %r4, %r5}, [%r1];"
    save = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%a, %a, %a, %a};"
    how = {"declarations": SHARED, "shared_bytes": 512}
    barrier = "bar.warp.sync -1;"
    for first, then in ((fill, load), (load, fill), (save, load), (load, save)):
        with pytest.raises(RaceError, match=r"stored|loaded"):
            each(row + first + then, LANE, **how)  # type: ignore[arg-type]
        each(row + first + barrier + then + barrier + load, LANE, **how)  # type: ignore[arg-type]


def test_copies_count_when_they_are_issued_and_when_they_arrive() -> None:
    issue = "cp.async.ca.shared.global [MINE], [%rd0], 16; cp.async.commit_group;"
    wait = "cp.async.wait_group 0;"
    copy = issue + wait
    refused(f"{issue} bar.sync 0; {wait} {LOAD}", "shared", "stored: .* ld")
    refused(f"{issue} bar.sync 0; {LOAD} {wait}", "shared", "loaded: .* cp.async.wait_group")
    refused(copy + LOAD, "shared", "stored")
    go(f"{copy} bar.sync 0; {LOAD}", "shared")
    refused(LOAD + copy, "shared", "loaded: .* cp")
