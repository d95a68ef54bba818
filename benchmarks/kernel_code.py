"""What Triton makes of a kernel, without a GPU: instructions an element, registers, stack, memory.

A kernel is compiled for a target, disassembled, and its loops are found (``loop_nest``). How often
a loop runs is not in the code: the caller says so, and gets the instructions that a program issues
for an element of what it reads. Numbers go against a table of budgets, so that a change that makes
the compiler spill registers or give up a layout is seen where there is no device to time it on::

    compiled = compile_kernel(
        decode, {"keys": "*i16", "out": "*fp32", "pages": "i32"}, {"BITS": 3},
        divisible=["keys", "out"], target=Target.CUDA_90, num_warps=4, num_stages=1,
    )
    code = read_code(compiled)
    print(code.nest)  # names, sizes and source lines of the loops
    instructions_per_element(code.nest, {"0": 16, "0.0": 4}, elements=16 * 256 * 128 * 2,
                             threads=code.threads)

These are counts, never times, and upper bounds: all branches of an ``if`` count.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loop_nest import Instruction, LoopNest, loop_nest, parse_amdgcn, parse_sass

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

BUDGETS = Path(__file__).parent / "kernel_budgets.csv"
LIMITS = ("max_instructions_per_element", "max_stack_bytes", "max_shared_bytes")
TOOL_SECONDS = 120


def _refuse_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "n", "no"):
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels are interpreted, not compiled, in this process. "
            "Compile them in one that is started without the variable."
        )


_refuse_interpreter()


class Target(StrEnum):
    """A device that kernels are compiled for."""

    CUDA_80 = "cuda:80"
    CUDA_90 = "cuda:90"
    HIP_GFX942 = "hip:gfx942"
    HIP_GFX90A = "hip:gfx90a"

    @property
    def is_amd(self) -> bool:
        """Whether ROCm compiles for it."""
        return self.value.startswith("hip")

    @property
    def warp_size(self) -> int:
        """Threads that run an instruction together."""
        return 64 if self.is_amd else 32

    @property
    def max_shared_bytes(self) -> int:
        """Shared memory that one program can have on the device."""
        kib = {Target.CUDA_80: 163, Target.CUDA_90: 227}
        return kib.get(self, 64) * 1024

    def for_triton(self) -> GPUTarget:
        """Return the target as Triton names it."""
        from triton.backends.compiler import GPUTarget

        backend, _, arch = self.value.partition(":")
        return GPUTarget(backend, int(arch) if arch.isdecimal() else arch, self.warp_size)


def compile_kernel(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Collection[str],
    target: Target,
    num_warps: int,
    num_stages: int,
    options: Mapping[str, Any] | None = None,
) -> CompiledKernel:
    """Compile a kernel as a launch with such arguments would.

    Args:
        kernel: A function under ``triton.jit`` or ``gluon.jit``.
        signature: Types of the arguments that are passed at run time, e.g. ``"*fp16"``, ``"i32"``.
        constexprs: Values of all others. Besides those declared ``tl.constexpr`` these are the
            arguments that a launch turns into constants: None, and integers equal to 1.
        divisible: Arguments that are multiples of 16, as a launch finds out by itself. Pointers
            to torch's tensors are; without it loads are not vectorised.
        target: Device.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelines.
        options: Further options of the target's backend, e.g. ``{"maxnreg": 128}``.

    Raises:
        RuntimeError: Kernels are interpreted in this process.
        ValueError: The arguments are not those of the kernel.
    """
    _refuse_interpreter()
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise ValueError(f"Not a function under triton.jit or gluon.jit: {kernel!r}")
    _check_arguments(kernel, signature, constexprs, divisible)
    names = kernel.arg_names
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        # Triton takes the arguments in the order of the mapping
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible
        },
    )
    return triton.compile(
        source,
        target=target.for_triton(),
        options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
    )


def _check_arguments(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    divisible: Collection[str],
) -> None:
    declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    wrong = {
        "neither in signature nor in constexprs": set(kernel.arg_names) - {*signature, *constexprs},
        "in both": set(signature) & set(constexprs),
        "not arguments of the kernel": {*signature, *constexprs} - set(kernel.arg_names),
        "declared constexpr, but in signature": declared & set(signature),
        "divisible, but not in signature": set(divisible) - set(signature),
    }
    if found := [f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names]:
        raise ValueError(f"Arguments of {kernel.__name__}: {'; '.join(found)}")


@dataclass(frozen=True)
class KernelCode:
    """A compiled kernel in numbers.

    Registers are those of one thread: on NVIDIA all, on AMD the vector registers with the
    accumulation registers. ``stack_bytes`` is the memory of a thread outside registers: spilled
    ones, and whatever else the compiler keeps there. AMD also says how many registers were spilled
    (vector and scalar ones, which may have gone to other registers); NVIDIA does not: None.
    ``shared_bytes`` is the shared memory of a program as Triton asks for it at launch, and
    ``shared_tiles`` what it allocates there by name, as ``4x64x8xf32``, sorted.
    """

    kernel: str
    target: Target
    threads: int
    registers: int
    spilled_registers: int | None
    stack_bytes: int
    shared_bytes: int
    shared_tiles: tuple[str, ...]
    nest: LoopNest
    assembly: str


def read_code(compiled: CompiledKernel) -> KernelCode:
    """Disassemble a compiled kernel.

    Raises:
        RuntimeError: A tool of NVIDIA's, which come with Triton, is missing or fails.
        ValueError: The assembly is not understood.
    """
    metadata = compiled.metadata
    target = Target(f"{metadata.target.backend}:{metadata.target.arch}")
    if metadata.target.backend == "cuda":
        cubin = compiled.asm["cubin"]
        assembly = _run_tool("nvdisasm", "-c", "-g", cubin=cubin)
        listing = parse_sass(assembly, metadata.name)
        usage = sass_usage(_run_tool("cuobjdump", "-res-usage", cubin=cubin), metadata.name)
    else:
        assembly = compiled.asm["amdgcn"]
        listing = parse_amdgcn(assembly, metadata.name)
        usage = amdgcn_usage(assembly)
    return KernelCode(
        kernel=metadata.name,
        target=target,
        threads=metadata.num_warps * target.warp_size,
        shared_bytes=metadata.shared,
        shared_tiles=shared_tiles(compiled.asm["ttgir"]),
        nest=loop_nest(listing),
        assembly=assembly,
        **usage,
    )


def shared_tiles(ttgir: str) -> tuple[str, ...]:
    """Tiles that a kernel allocates in shared memory, from its intermediate form."""
    found = re.findall(r"ttg\.local_alloc\b.*-> !ttg\.memdesc<([0-9a-z]+),", ttgir)
    if len(found) != len(re.findall(r"= ttg\.local_alloc\b", ttgir)):
        raise ValueError("An allocation in shared memory is not understood")
    return tuple(sorted(found))


def sass_usage(text: str, kernel: str) -> dict[str, Any]:
    """Registers and stack from what ``cuobjdump -res-usage`` prints."""
    match = re.search(
        rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text, re.DOTALL
    )
    if match is None:
        raise ValueError(f"No resources of {kernel} in: {text!r}")
    registers, stack, local = map(int, match.groups())
    return {"registers": registers, "spilled_registers": None, "stack_bytes": stack + local}


def amdgcn_usage(text: str) -> dict[str, Any]:
    """Registers and stack from the metadata at the end of AMD's assembly."""
    found = dict(re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE))
    try:
        return {
            "registers": int(found["vgpr_count"]),
            "spilled_registers": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
            "stack_bytes": int(found["private_segment_fixed_size"]),
        }
    except KeyError as error:
        raise ValueError(f"No {error} in the metadata of the assembly") from None


def _run_tool(tool: str, *arguments: str, cubin: bytes) -> str:
    """Run one of NVIDIA's tools that come with Triton, and return what it prints."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    path = Path(os.environ.get(f"TRITON_{tool.upper()}_PATH", found))
    if not path.is_file():
        raise RuntimeError(
            f"{tool} is needed to read code for NVIDIA, but {path} is missing. Triton's wheels for "
            f"Linux contain it; TRITON_{tool.upper()}_PATH names another place."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        try:
            done = subprocess.run(
                [path, *arguments, file],
                check=False,
                capture_output=True,
                text=True,
                timeout=TOOL_SECONDS,
            )
        except OSError as error:
            raise RuntimeError(f"{path} does not run here: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{tool} failed with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def instructions_per_element(
    nest: LoopNest, trips: Mapping[str, float], *, elements: float, threads: int
) -> float:
    """Thread-instructions that one program issues for each of its elements.

    Args:
        nest: Loops of the kernel.
        trips: Iterations of every loop each time that it is entered from the loop around it.
        elements: What the program works on, e.g. the cached numbers that it reads.
        threads: Threads of the program. A warp issues an instruction once for all of its threads,
            scalar instructions of AMD's included: one takes as many slots as any other.

    Raises:
        ValueError: Loops without trips, or trips of loops that the kernel does not have.
    """
    by_pipe = instructions_by_pipe(nest, trips, elements=elements, threads=threads)
    return sum(by_pipe.values())


def instructions_by_pipe(
    nest: LoopNest, trips: Mapping[str, float], *, elements: float, threads: int
) -> dict[str, float]:
    """``instructions_per_element`` by execution pipe: for information, the most used one first."""
    names = {loop.name for loop in nest.loops}
    if missing := [loop for loop in nest.loops if loop.name not in trips]:
        text = "\n  ".join(map(str, missing))
        raise ValueError(f"Loops without trips (name, source, own and all instructions):\n  {text}")
    if unknown := sorted(set(trips) - names):
        raise ValueError(f"Trips of loops that do not exist: {unknown}; there are {sorted(names)}")
    counts: dict[str, float] = {}

    def count(instructions: Collection[Instruction], times: float) -> None:
        for instruction in instructions:
            counts[instruction.pipe] = counts.get(instruction.pipe, 0) + times

    count(nest.once, 1)
    times: dict[str | None, float] = {None: 1}
    for loop in nest.loops:
        times[loop.name] = times[loop.parent] * trips[loop.name]
        count(loop.own, times[loop.name])
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return {pipe: number * threads / elements for pipe, number in ordered}


@dataclass(frozen=True)
class Measured:
    """What ``check`` holds against a budget."""

    target: Target
    instructions_per_element: float
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Budget:
    """One row of the table: most that a variant of a kernel may use. None is no limit.

    ``settings`` are the columns that are neither names nor limits, such as ``bits``.
    """

    kernel: str
    target: Target
    variant: str
    settings: Mapping[str, str]
    max_instructions_per_element: float | None
    max_stack_bytes: float | None
    max_shared_bytes: float | None

    def __str__(self) -> str:
        settings = [f"{name} {value}" for name, value in self.settings.items() if value]
        return " ".join([self.kernel, self.target, self.variant, *settings])


def read_budgets(path: Path = BUDGETS) -> list[Budget]:
    """Read the table of budgets: columns kernel, target, variant, the limits, and settings.

    Raises:
        ValueError: A column or cell is missing or wrong, or two rows are about the same.
    """
    named = ("kernel", "target", "variant")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        columns = reader.fieldnames or []
        if missing := [column for column in (*named, *LIMITS) if column not in columns]:
            raise ValueError(f"{path}: columns {missing} are missing, found {list(columns)}")
        budgets: dict[str, Budget] = {}
        for row in reader:
            try:
                budget = Budget(
                    kernel=row["kernel"],
                    target=Target(row["target"]),
                    variant=row["variant"],
                    settings={c: row[c] for c in columns if c not in (*named, *LIMITS)},
                    **{limit: float(row[limit]) if row[limit] else None for limit in LIMITS},
                )
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            if str(budget) in budgets:
                raise ValueError(f"{path}, line {reader.line_num}: a second row about {budget}")
            budgets[str(budget)] = budget
    return list(budgets.values())


def check(measured: Measured, budget: Budget) -> list[str]:
    """Say in words where a kernel is over its budget or does not fit the device.

    Raises:
        ValueError: The budget is one for another target.
    """
    if measured.target != budget.target:
        raise ValueError(f"Measured for {measured.target}, but the budget is one for {budget}")
    pairs = (
        ("instructions per element", measured.instructions_per_element, LIMITS[0]),
        ("bytes of stack", measured.stack_bytes, LIMITS[1]),
        ("bytes of shared memory", measured.shared_bytes, LIMITS[2]),
    )
    violations = []
    for what, found, limit in pairs:
        allowed = getattr(budget, limit)
        if allowed is not None and found > allowed:
            violations.append(f"{budget}: found {found:.6g} {what}, allowed {allowed:.6g}")
    if measured.shared_bytes > measured.target.max_shared_bytes:
        violations.append(
            f"{budget}: found {measured.shared_bytes} bytes of shared memory, the device has "
            f"{measured.target.max_shared_bytes}"
        )
    return violations
