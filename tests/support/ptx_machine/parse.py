"""PTX text to a kernel: parameters, shared memory, constant data, and instructions in order.

What only describes the program (``.loc``, ``.file``, ``.pragma``, debug sections) is left out. A
module must hold one entry and no other function (PTX ISA 8.7, 4 "Syntax", 5 "State spaces").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptx_machine.syntax import BITS, Instruction, Scope, immediate


@dataclass(frozen=True)
class Kernel:
    """An entry.

    Fields:
        parameters: name and type of each, in order.
        shared: bytes of each symbol in shared memory; None for those that a launch sizes.
        data: constant data by symbol.
        threads: of a program, where the entry says so.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    shared: dict[str, int | None]
    data: dict[str, bytes]
    threads: int | None
    instructions: tuple[Instruction, ...]


def parse(text: str) -> Kernel:
    """Parse a module with one entry.

    Raises:
        NotImplementedError: There is something in it that the machine does not know.
    """
    lines = _code_lines(text)
    whole = "\n".join(line for _, line in lines)
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*([^{]*)\{", whole)
    if len(entries) != 1 or re.search(r"^\s*(\.visible |\.weak )*\.func\b", whole, re.MULTILINE):
        raise NotImplementedError("a module of one entry and no functions is needed")
    name, parameters, directives = entries[0]
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    start = next(i for i, (_, line) in enumerate(lines) if ".entry" in line)
    shared, data = _symbols("\n".join(line for _, line in lines[:start]))
    opening = next(i for i in range(start, len(lines)) if lines[i][1].lstrip().startswith("{"))
    return Kernel(
        name=name,
        parameters=tuple(_parameter(one) for one in parameters.split(",") if one.strip()),
        shared=shared,
        data=data,
        threads=int(threads[1]) if threads else None,
        instructions=tuple(_Body(lines[opening:], shared).read()),
    )


def _code_lines(text: str) -> list[tuple[int, str]]:
    """Lines with numbers, without comments, places in sources and debug sections."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("//")[0].strip()
        if line.startswith(".section"):
            break
        if line and not re.match(r"\.(loc|file|version|target|address_size)\b", line):
            lines.append((number, line))
    return lines


def _parameter(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"\s*\.param\s+\.(\w+)\s+(?:\.\w+\s+|\d+\s+)*([\w$]+)\s*", text)
    if found is None or found[1] not in BITS:
        raise NotImplementedError(f"parameter {text.strip()}")
    return found[2], found[1]


_VARIABLE = re.compile(
    r"\.(shared|global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\s*"
    r"(?:\[\s*(\d*)\s*\])?\s*(?:=\s*\{?([^;}]*)\}?)?\s*;"
)


def _symbols(text: str) -> tuple[dict[str, int | None], dict[str, bytes]]:
    shared: dict[str, int | None] = {}
    data: dict[str, bytes] = {}
    for space, kind, name, count, values in _VARIABLE.findall(text):
        item = BITS[kind] // 8
        if space == "shared":
            shared[name] = int(count) * item if count else None
            continue
        numbers = [immediate(one) & ((1 << 8 * item) - 1) for one in values.split(",") if one]
        raw = b"".join(number.to_bytes(item, "little") for number in numbers)
        data[name] = raw.ljust(item * int(count or 1), b"\0")
    return shared, data


class _Body:
    """Reads the statements between the braces of an entry."""

    def __init__(self, lines: list[tuple[int, str]], shared: dict[str, int | None]) -> None:
        self.lines, self.shared = lines, shared
        self.scope: Scope | None = None
        self.found: list[Instruction] = []

    def read(self) -> list[Instruction]:
        begun, first = "", 0
        for number, rest in self.lines:
            while rest:
                if not begun:
                    first = number
                    if rest[0] in "{}":
                        opens = rest[0] == "{"
                        self.scope = Scope(self.scope) if opens else self._scope.parent
                        rest = rest[1:].lstrip()
                        if self.scope is None:
                            return self.found
                        continue
                    if label := re.match(r"([\w$%]+)\s*:(?!:)\s*", rest):
                        self._scope.labels[label[1]] = len(self.found)
                        rest = rest[label.end() :]
                        continue
                head, end, rest = rest.partition(";")
                begun = f"{begun} {head}".strip()
                rest = rest.strip()
                if end:
                    self._statement(begun, first)
                    begun = ""
        raise NotImplementedError("the entry has no end")

    @property
    def _scope(self) -> Scope:
        assert self.scope is not None
        return self.scope

    def _statement(self, text: str, line: int) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self._declare(text)
            return
        if text.startswith(".shared"):
            self.shared.update(_symbols(text + ";")[0])
            return
        found = re.fullmatch(r"(?:@(!?[\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
        if found is None:
            raise NotImplementedError(f"line {line}: {text}")
        operands = re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", found[3])
        self.found.append(
            Instruction(
                opcode=found[2],
                operands=tuple(" ".join(one.split()) for one in operands),
                guard=found[1],
                scope=self._scope,
                line=line,
                text=" ".join(text.split()),
            )
        )

    def _declare(self, text: str) -> None:
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if found is None or found[1] not in BITS:
            raise NotImplementedError(text)
        for name in found[2].split(","):
            family = re.fullmatch(r"\s*([\w$%]+)<(\d+)>\s*", name)
            if family:
                self._scope.families[family[1]] = (BITS[found[1]], int(family[2]))
            else:
                self._scope.widths[name.strip()] = BITS[found[1]]
