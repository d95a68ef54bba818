"""A few instructions, run with a number for each of 32 threads: for tests of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ptx_machine.machine import Order, run

Array = np.ndarray[Any, np.dtype[Any]]


def module(body: str, *, parameters: int, declarations: str = "") -> str:
    """PTX of an entry ``snippet`` of that many addresses, ``p0`` and so on."""
    names = ", ".join(f".param .u64 p{number}" for number in range(parameters))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
{declarations}
.visible .entry snippet({names})
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<80>;
    .reg .b64 %rd<40>;
{body}
    ret;
}}
"""


def each(
    body: str,
    *inputs: ArrayLike,
    results: Sequence[int] = (32,),
    declarations: str = "",
    shared_bytes: int = 0,
    order: Order = "forward",
    races: bool = True,
) -> list[Array]:
    """Run instructions on ``%a``, ``%b``, ``%c``, ... and return ``%x``, ``%y``, ...

    Args:
        body: the instructions.
        inputs: raw bits of each thread, uint16, uint32 or uint64 ``[n]``; n is a multiple of 32.
        results: bits of each result.
        declarations: in front of the entry.
        shared_bytes: of ``[n]`` threads.
        order: of threads.
        races: look for accesses that no barrier puts in order.

    Returns: raw bits of each result.
    """
    given = [np.ascontiguousarray(one) for one in inputs]
    threads = len(given[0]) if given else 32
    names = "abcdefgh"[: len(given)], "xyzuvw"[: len(results)]
    widths = [[8 * one.dtype.itemsize for one in given], list(results)]
    kept = [np.zeros(threads, f"u{bits // 8}") for bits in results]
    lines = ["mov.u32 %r79, %tid.x;"]
    for letters, bits_of in zip(names, widths, strict=True):
        lines += [f".reg .b{bits} %{n};" for n, bits in zip(letters, bits_of, strict=True)]

    def access(number: int, bits: int, operation: str) -> list[str]:
        return [
            f"ld.param.b64 %rd39, [p{number}];",
            f"mad.wide.u32 %rd39, %r79, {bits // 8}, %rd39;",
            operation,
        ]

    for number, (name, bits) in enumerate(zip(names[0], widths[0], strict=True)):
        lines += access(number, bits, f"ld.global.b{bits} %{name}, [%rd39];")
    lines.append(body)
    for number, (name, bits) in enumerate(zip(names[1], results, strict=True)):
        lines += access(len(given) + number, bits, f"st.global.b{bits} [%rd39], %{name};")
    arrays = [*given, *kept]
    run(
        module("\n".join(lines), parameters=len(arrays), declarations=declarations),
        grid=(1,),
        threads=threads,
        arguments=[torch.from_numpy(one.view(f"i{one.dtype.itemsize}")) for one in arrays],
        shared_bytes=shared_bytes,
        order=order,
        races=races,
    )
    return kept
