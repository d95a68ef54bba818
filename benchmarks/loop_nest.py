"""Loops of a compiled kernel, read from its assembly text: NVIDIA's SASS or AMD's AMDGCN.

The text becomes basic blocks, the blocks a nest of loops. A loop is a set of blocks that reach each
other. Its header is the block through which it is entered, and what still is a loop without the
branches back to the header is an inner loop. So two loops with one header are one, where the
compiler lays out a block plays no role, and code that cannot be reached (the branch to itself and
the NOPs behind the last EXIT) does not count. Neither does a loop without any way out: it is a trap
for errors. Of an ``if`` in a loop all branches count: the numbers are upper bounds.

Loops are named by order of their headers and by nesting: ``"0"``, ``"0.0"``, ``"0.1"``, ``"1"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Flow = Literal["next", "branch", "jump", "call"]
KERNEL_END, FUNCTION_END = "the end", "the caller"
"""Targets of instructions that end a kernel, and of those that return from a function."""

SASS_PIPES = {
    "alu": "LOP LOP3 PLOP3 SHF SHL SHR PRMT SEL FSEL ISETP FSETP FMNMX IMNMX VIMNMX IADD3 VIADD"
    " LEA SGXT BMSK IABS P2R R2P I2FP F2FP MOV CS2R VABSDIFF FSET",
    "fma": "HFMA2 HADD2 HMUL2 HSET2 HSETP2 HMNMX2 FFMA FADD FMUL FSWZADD IMAD IDP",
    "memory": "LDG STG LD ST LDS STS LDSM STSM LDGSTS LDC ATOM ATOMG ATOMS RED REDUX SHFL UBLKCP"
    " UTMALDG UTMASTG",
    "stack": "LDL STL",
    "tensor": "HMMA HGMMA IMMA IGMMA QGMMA DMMA BGMMA",
}
"""Execution pipes of NVIDIA's opcodes as far as public tables tell; all others are "other"."""
AMDGCN_PIPES = (
    ("tensor", r"v_s?mfma"),
    ("stack", r"scratch_"),
    ("memory", r"(buffer|global|flat|ds|tbuffer)_|s_(load|buffer_load|store)"),
    ("other", r"s_(waitcnt|nop|barrier|cbranch|branch|sleep|setprio|sched|endpgm)"),
    ("scalar", r"s_"),
    ("vector", r"v_"),
)
_PIPE_OF = {opcode: pipe for pipe, opcodes in SASS_PIPES.items() for opcode in opcodes.split()}

_SASS_LINE = re.compile(
    r'\s*//## File "(?P<file>[^"]*)", line (?P<line>\d+)'
    r"|(?P<label>[.$\w]+):\s*$"
    r"|\s*/\*[0-9a-f]{4,}\*/\s+(?P<code>[^;]+?)\s*;"
)
_SASS_CODE = re.compile(r"(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[\w.]+)\s*(?P<operands>.*)")
_SASS_LABEL = re.compile(r"`\(([.$\w]+)\)|(\.L_x_\d+)")
_AMDGCN_LINE = re.compile(
    r"\s+\.loc\s[^;]*;\s*(?P<place>[^\s:]*:\d+):"
    r"|(?P<label>[.$\w]+):"
    r"|\s*(?P<code>[a-z]\w*\b[^;]*)"
)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    ``flow`` says what runs behind it: what follows ("next"), that or one of ``targets`` ("branch"),
    only one of ``targets`` ("jump"), a function and then what follows ("call").
    """

    text: str
    pipe: str
    flow: Flow = "next"
    targets: tuple[str, ...] = ()
    source: str = ""
    """``file.py:line`` of the innermost function, where the assembly names it."""


@dataclass(frozen=True)
class Listing:
    """Instructions in the order of the text; ``labels`` are indices into them."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Loop:
    """A loop: ``own`` are its instructions outside inner loops, ``total`` counts those too."""

    name: str
    parent: str | None
    own: tuple[Instruction, ...]
    total: int
    source: str
    """Where its last branch back comes from: mostly the line of the ``for``."""

    def __str__(self) -> str:
        first = "; ".join(instruction.text for instruction in self.own[:3])
        return f"{self.name} ({self.source or '?'}): {len(self.own)} of {self.total}: {first} ..."


@dataclass(frozen=True)
class Call:
    """A call of a function, whose ``size`` instructions no count contains."""

    text: str
    loop: str | None
    size: int | None
    """None where the assembly does not contain the function."""


@dataclass(frozen=True)
class LoopNest:
    """What runs once, and the loops, outer ones before their inner ones."""

    once: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        lines = [f"once: {len(self.once)}", *(f"loop {loop}" for loop in self.loops)]
        lines += [f"not counted: {c.text}, {c.size} in loop {c.loop}" for c in self.calls]
        return "\n".join(lines)


def parse_sass(text: str, kernel: str) -> Listing:
    """Read what ``nvdisasm -c`` or ``nvdisasm -c -g`` prints of a kernel."""
    section = re.search(
        rf"^\.text\.{re.escape(kernel)}:$(.*?)(?=^\s*\.section|\Z)", text, re.MULTILINE | re.DOTALL
    )
    if section is None:
        raise ValueError(f"No code of {kernel} in the disassembly: {text[:200]!r}")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    for match in filter(None, map(_SASS_LINE.match, section[1].splitlines())):
        if match["file"] is not None:
            source = f"{match['file'].rsplit('/', 1)[-1]}:{match['line']}"
        elif match["label"]:
            labels[match["label"]] = len(instructions)
        else:
            instructions.append(_sass_instruction(match["code"], source))
    return Listing(tuple(instructions), labels)


def _sass_instruction(code: str, source: str) -> Instruction:
    match = _SASS_CODE.fullmatch(code)
    if match is None:
        raise ValueError(f"Not an instruction: {code!r}")
    opcode, operands = match["opcode"], match["operands"]
    base = opcode.split(".")[0]
    targets = tuple(a or b for a, b in _SASS_LABEL.findall(operands))
    always = match["guard"] in (None, "PT", "UPT")
    flow: Flow = "next"
    # BRA.DIV leads to code for threads that went apart, which these kernels' threads never do
    if base in ("BRA", "JMP", "BRX", "JMX", "BRXU", "JMXU") and not opcode.startswith("BRA.DIV"):
        if not targets:
            raise ValueError(f"A branch whose targets are unknown: {code}")
        # BRA.U !UP0, `(.L_x_1) has its condition before the target
        direct = base in ("BRA", "JMP")
        flow = "jump" if always and (operands.startswith("`") or not direct) else "branch"
    elif base in ("EXIT", "RET", "KILL"):
        targets = (FUNCTION_END if base == "RET" else KERNEL_END,)
        flow = "jump" if always else "branch"
    elif base == "CALL":
        flow = "call"
    else:
        targets = ()
    return Instruction(code, _PIPE_OF.get(base, "other"), flow, targets, source)


def parse_amdgcn(text: str, kernel: str) -> Listing:
    """Read the assembly that Triton keeps of a kernel for AMD."""
    section = re.search(
        rf"^{re.escape(kernel)}:(.*?)^\.Lfunc_end\d+:", text, re.MULTILINE | re.DOTALL
    )
    if section is None:
        raise ValueError(f"No code of {kernel} in the assembly: {text[:200]!r}")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    for match in filter(None, map(_AMDGCN_LINE.match, section[1].splitlines())):
        if match["place"]:
            source = "" if match["place"].endswith(":0") else match["place"]
        elif match["label"]:
            labels[match["label"]] = len(instructions)
        else:
            instructions.append(_amdgcn_instruction(match["code"].strip(), source))
    return Listing(tuple(instructions), labels)


def _amdgcn_instruction(code: str, source: str) -> Instruction:
    opcode, _, operands = code.partition(" ")
    pipe = next((name for name, pattern in AMDGCN_PIPES if re.match(pattern, opcode)), "other")
    flow: Flow = "next"
    targets: tuple[str, ...] = (operands.split(",")[-1].strip(),)
    if opcode == "s_branch":
        flow = "jump"
    elif opcode.startswith("s_cbranch"):
        flow = "branch"
    elif opcode in ("s_swappc_b64", "s_call_b64"):
        flow = "call"
    elif opcode.startswith(("s_endpgm", "s_setpc_b64")):
        flow, targets = "jump", (KERNEL_END if opcode.startswith("s_endpgm") else FUNCTION_END,)
    else:
        targets = ()
    return Instruction(code, pipe, flow, targets, source)


def loop_nest(listing: Listing) -> LoopNest:
    """Find the loops of a kernel that starts at its first instruction."""
    listing = _without_endless_calls(listing)
    code, (blocks, edges) = listing.instructions, _blocks(listing)
    end, everywhere = len(blocks), set(range(len(edges)))
    entered_from: list[set[int]] = [set() for _ in edges]
    for block, targets in enumerate(edges):
        for target in targets:
            entered_from[target].add(block)
    counted = _reach({0}, edges, everywhere) & _reach({end}, entered_from, everywhere) - {end}

    bodies = {name: (header, body) for name, header, body in _loops(counted, edges)}
    # inner loops come later and take their blocks over
    innermost = {block: name for name, (_, body) in bodies.items() for block in body}

    def instructions(inside: Iterable[int]) -> tuple[Instruction, ...]:
        return tuple(code[i] for block in sorted(inside) for i in blocks[block])

    loops = []
    for name, (header, body) in bodies.items():
        last_branch_back = blocks[max(block for block in body if header in edges[block])][-1]
        loops.append(
            Loop(
                name=name,
                parent=name.rpartition(".")[0] or None,
                own=instructions(block for block in body if innermost[block] == name),
                total=len(instructions(body)),
                source=code[last_branch_back].source,
            )
        )
    calls = tuple(
        Call(code[i].text, innermost.get(block), len(_called(i, listing, blocks, edges)) or None)
        for block in sorted(counted)
        for i in blocks[block]
        if code[i].flow == "call"
    )
    once = instructions(block for block in counted if block not in innermost)
    return LoopNest(once, tuple(loops), calls)


def _without_endless_calls(listing: Listing) -> Listing:
    """Make branches of calls that never return: compilers leave loops by them."""
    blocks, edges = _blocks(listing)
    code = list(listing.instructions)
    for i, instruction in enumerate(code):
        if instruction.flow == "call" and (called := _called(i, listing, blocks, edges)):
            ends = {target for j in called for target in listing.instructions[j].targets}
            if FUNCTION_END not in ends:
                flow: Flow = "branch" if instruction.text.startswith("@") else "jump"
                code[i] = replace(instruction, flow=flow)
    return Listing(tuple(code), listing.labels)


def _called(
    call: int, listing: Listing, blocks: Sequence[range], edges: Sequence[set[int]]
) -> list[int]:
    """Indices of the instructions of a called function; none where its code is not here."""
    places = {listing.labels.get(target) for target in listing.instructions[call].targets}
    first = {block for block, inside in enumerate(blocks) if inside.start in places}
    reached = _reach(first, edges, set(range(len(blocks))))
    return [i for block in sorted(reached) for i in blocks[block]]


def _blocks(listing: Listing) -> tuple[list[range], list[set[int]]]:
    """Ranges of instructions that run together, and for each the blocks that may run behind it.

    Two more blocks without instructions stand for the end of the kernel and for a caller.
    """
    count = len(listing.instructions)
    places = {**listing.labels, KERNEL_END: count, FUNCTION_END: count + 1}
    starts = {0, *listing.labels.values()}
    for index, instruction in enumerate(listing.instructions):
        if instruction.flow in ("branch", "jump"):
            starts.add(index + 1)
            if unknown := set(instruction.targets) - set(places):
                raise ValueError(f"A branch to nowhere: {instruction.text} ({sorted(unknown)})")
    ordered = sorted(start for start in starts if start < count)
    number = {start: block for block, start in enumerate([*ordered, count, count + 1])}
    blocks = [range(*pair) for pair in pairwise([*ordered, count])]
    edges: list[set[int]] = []
    for block in blocks:
        last = listing.instructions[block[-1]]
        follow = set() if last.flow == "jump" else {number[block.stop]}
        if last.flow in ("branch", "jump"):
            follow |= {number[places[target]] for target in last.targets}
        edges.append(follow)
    return blocks, [*edges, set(), set()]


def _loops(
    inside: set[int], edges: Sequence[set[int]], prefix: str = ""
) -> Iterator[tuple[str, int, set[int]]]:
    """Name, header and blocks of every loop in ``inside``, each before its inner loops."""
    found = []
    seen: set[int] = set()
    # every loop has a branch backwards in the text
    for start in sorted({t for block in inside for t in edges[block] if t <= block} & inside):
        if start in seen:
            continue
        ahead = _reach(edges[start], edges, inside)
        body = {block for block in ahead if start in _reach({block}, edges, ahead)}
        if start in ahead:
            seen |= body
            entries = {t for b in inside - body for t in edges[b] & body}
            found.append((min(entries or body), body))
    for number, (header, body) in enumerate(sorted(found, key=lambda loop: loop[0])):
        yield f"{prefix}{number}", header, body
        yield from _loops(body, [targets - {header} for targets in edges], f"{prefix}{number}.")


def _reach(start: set[int], edges: Sequence[set[int]], inside: set[int]) -> set[int]:
    """Blocks of ``inside`` that can be reached from ``start``, which is among them."""
    reached, waiting = set(), list(start & inside)
    while waiting:
        block = waiting.pop()
        if block not in reached:
            reached.add(block)
            waiting += edges[block] & inside - reached
    return reached
