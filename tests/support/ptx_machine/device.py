"""Launches of Triton's and Gluon's kernels on the machine: ``with emulated("cuda:90"): ...``.

Kernels are compiled as a launch on that device would compile them, from the types, alignment and
values of their arguments, and then run on tensors on the CPU. Needs a process in which
TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ptx_machine.machine import Argument, Order, run

Specialization = tuple[Any, ...]


@dataclass
class Launch:
    """One launch: kernel, grid, and instructions that its warps issued, by opcode."""

    kernel: str
    grid: tuple[int, ...]
    instructions: Counter[str]


@dataclass
class Emulation:
    """What ``emulated`` does and has done.

    Fields:
        target: as ``cuda:90``.
        launches: so far.
        compiled: kernels by what they were specialized for.
    """

    target: str
    order: Order
    launches: list[Launch] = field(default_factory=list)
    compiled: dict[str, Any] = field(default_factory=dict)


def launch(
    compiled: Any,
    grid: Sequence[int],
    arguments: Sequence[Argument],
    *,
    order: Order = "forward",
    names: Sequence[str] = (),
    races: bool = True,
) -> Counter[str]:
    """Run what ``triton.compile`` returns; arguments without constants, and ``run``'s result.

    Raises:
        NotImplementedError: The kernel needs clusters or scratch memory.
    """
    metadata = compiled.metadata
    if getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "global_scratch_size", 0):
        raise NotImplementedError("clusters and scratch memory")
    return run(
        compiled.asm["ptx"],
        grid=grid,
        threads=32 * metadata.num_warps,
        arguments=arguments,
        shared_bytes=metadata.shared,
        order=order,
        names=names,
        races=races,
    )


def compile_for(function: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any], target: str,
                cache: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Compile a kernel for the arguments of a launch.

    Returns: (compiled kernel, values by argument, types by argument).
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    name, _, arch = target.partition(":")
    device = GPUTarget(name, int(arch), 32)
    backend = make_backend(device)
    how = {"debug": function.debug or False, **kwargs}
    how["instrumentation_mode"] = knobs.compilation.instrumentation_mode
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*arguments, **how)
    # As launches do it: pointers and integers that are multiples of 16, integers equal to 1.
    options, signature, constants, attributes = function._pack_args(
        backend, how, bound, specialization, options
    )
    key = f"{function.cache_key} {specialization} {options} {target}"
    if key not in cache:
        source = (GluonASTSource if function.is_gluon() else ASTSource)(
            function, signature, constants, attributes
        )
        cache[key] = triton.compile(source, target=device, options=options.__dict__)
    return cache[key], bound, signature


_COMPILED: dict[str, Any] = {}


@contextmanager
def emulated(
    target: str = "cuda:90", order: Order = "forward", *, races: bool = True
) -> Iterator[Emulation]:
    """Run every launch on the machine; yields a record of them.

    Args:
        target: device that kernels are compiled for, ``cuda:80`` or ``cuda:90``.
        order: of CTAs, of warps between barriers, and of threads (``ptx_machine.machine``).
        races: look for accesses that no barrier puts in order (``ptx_machine.race``).

    Raises:
        RuntimeError: Kernels are interpreted in this process.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "n", "no"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled in this process")
    from triton.runtime.jit import JITFunction

    emulation = Emulation(target, order, compiled=_COMPILED)

    def run_there(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled, bound, types = compile_for(self, args, kwargs, target, emulation.compiled)
        if warmup:
            return compiled
        grid = tuple(grid(bound) if callable(grid) else grid)
        names = [name for name, kind in types.items() if kind != "constexpr"]
        if wrong := [name for name in names if not isinstance(types[name], str)]:
            raise NotImplementedError(f"arguments {wrong}")
        given = [bound[name] for name in names]
        issued = launch(compiled, grid, given, order=order, names=names, races=races)
        emulation.launches.append(Launch(self.__name__, grid, issued))
        return compiled

    before = JITFunction.run
    JITFunction.run = run_there
    try:
        yield emulation
    finally:
        JITFunction.run = before
