"""PTX text to a Kernel: parameters, variables, registers and a flat list of statements."""

from __future__ import annotations

import bisect
import dataclasses
import re

import numpy as np

from . import operands
from .fault import Fault

_DELIMITER = re.compile(r"[{};]|(?<!:):(?!:)")
_LABEL = re.compile(r"[$\w%]+")
_GUARD = re.compile(r"@(!?)\s*([%\w$.]+)\s+(.*)", re.S)
_REGISTERS = re.compile(r"(%?[\w$]+)<(\d+)>")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(?:v[24]\s+\.)?([busf]\d+)\s+([\w$]+)\s*(\[(\d*)\])?\s*(?:=\s*(.*))?",
    re.S,
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;()]*(?:\([^)]*\)[^{;()]*)*)\{", re.S)
_PARAMETER = re.compile(r"\.param\b(.*?)([\w$]+)\s*(?:\[(\d+)\])?\s*$", re.S)
_MODULE_VARIABLE = re.compile(
    r"^[ \t]*(?:\.(?:visible|extern|weak|common)\s+)*\.(?:shared|global|const)\s[^;{]*(?:\{[^}]*\})?\s*;", re.M
)


@dataclasses.dataclass(frozen=True)
class Statement:
    """One instruction: ``@guard opcode.modifiers operands``."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: operands.Register | None
    negated: bool  #: the guard is ``@!p``
    line: int
    text: str


@dataclasses.dataclass(frozen=True)
class Data:
    """A variable in global or constant memory, with its first bytes."""

    bytes: np.ndarray
    writable: bool


def type_bits(name: str) -> int:
    """``u32`` -> 32; a predicate counts as one bit."""
    if name == "pred":
        return 1
    if name in ("bf16", "f16x2", "bf16x2", "tf32"):
        return 16 if name == "bf16" else 32
    return int(name.lstrip("busf"))


class Kernel:
    """One entry of a PTX module.

    ``parameters`` lists (name, type, bytes) in order; an array's type is ``b8``. ``entry`` names the entry where the
    module has several.
    """

    def __init__(self, text: str, entry: str | None = None):
        text = _without_comments(text)
        self._lines = [m.start() for m in re.finditer("\n", text)]
        match = self._entry(text, entry)
        self.name: str = match[1]
        self.parameters = [_parameter(part) for part in operands.split(match[2] or "")]
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}
        self.shared_variables: dict[str, int | None] = {}  #: None: the dynamic shared memory
        self.local_variables: dict[str, int] = {}
        self.data: dict[str, Data] = {}
        self.static_shared = 0
        self.dynamic_alignment = 16
        self.local_bytes = 0
        needs = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", match[3])
        self.required_threads = tuple(int(n or 1) for n in needs.groups()) if needs else None
        end = _closing_brace(text, match.end())
        body = text[match.end() : end]
        words = set(re.findall(r"[\w$]+", body))
        for variable in _MODULE_VARIABLE.finditer(_blank_bodies(text)):
            self._variable(variable[0].strip().rstrip(";"), words)
        self._body(body, match.end())
        self.machines: dict = {}  #: by the block's shape; see block.machine_for

    def _entry(self, text: str, wanted: str | None):
        found = list(_ENTRY.finditer(text))
        names = [m[1] for m in found]
        if wanted is None and len(found) > 1:
            raise Fault(f"the module has several entries; name one of {names}")
        for m in found:
            if wanted in (None, m[1]):
                return m
        raise Fault(f"the module has no entry {wanted or ''}; it has {names}")

    def line_of(self, position: int) -> int:
        return bisect.bisect_left(self._lines, position) + 1

    def _body(self, body: str, start: int) -> None:
        scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        opened, at = 0, 0
        pending = ""  # the statement so far, where it contains braces or a colon
        begin = 0
        for delimiter in _DELIMITER.finditer(body):
            if delimiter.start() < at:
                continue  # within braces that belong to a statement
            mark = delimiter[0]
            piece = pending + body[at : delimiter.start()]
            stripped = piece.strip()
            if not stripped and mark in "{}":
                if mark == "{":
                    opened += 1
                    scopes.append((opened, {}))
                else:
                    scopes.pop()
                at, pending = delimiter.end(), ""
                begin = at
            elif mark == "{":
                close = body.index("}", delimiter.start()) + 1
                pending, at = piece + body[delimiter.start() : close], close
            elif mark == ":" and _LABEL.fullmatch(stripped):
                self.labels[stripped] = len(self.statements)
                at, pending = delimiter.end(), ""
                begin = at
            elif mark == ";":
                first = start + begin + _leading(body, begin)
                self._statement(" ".join(stripped.split()), scopes, self.line_of(first))
                at, pending = delimiter.end(), ""
                begin = at
            else:
                pending, at = piece + mark, delimiter.end()
        if body[at:].strip():
            raise Fault(f"{self.name}: the text {body[at:].strip()[:60]!r} at the end is no statement")

    def _statement(self, text: str, scopes, line: int) -> None:
        if not text or re.match(r"\.(?:pragma|loc|file)\b", text):
            return
        if text.startswith(".reg"):
            self._declare_registers(text, scopes)
            return
        if text.startswith("."):
            self._variable(text, None)
            return
        guard, negated, rest = None, False, text
        if m := _GUARD.fullmatch(text):
            negated, rest = bool(m[1]), m[3]
            name = _lookup(m[2], scopes)
            if name is None:
                raise Fault(f"{self.name}, line {line}: {text}: {m[2]} is no register")
            guard = operands.Register(name)
        opcode, _, arguments = rest.partition(" ")
        name, *modifiers = opcode.split(".")
        try:
            parsed = tuple(operands.parse(part, lambda n: _lookup(n, scopes)) for part in operands.split(arguments))
        except Fault as fault:
            raise Fault(f"{self.name}, line {line}: {text}: {fault}") from None
        self.statements.append(Statement(name, tuple(modifiers), parsed, guard, negated, line, text))

    def _declare_registers(self, text: str, scopes) -> None:
        _, type_, names = text.split(None, 2)
        scope, known = scopes[-1]
        for name in names.split(","):
            name = name.strip()
            many = _REGISTERS.fullmatch(name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = f"{each}@{scope}" if scope else each
                known[each] = unique
                self.registers[unique] = type_.lstrip(".")

    def _variable(self, text: str, used: set[str] | None) -> None:
        """Note a variable; one of the module only if the kernel names it (``used``)."""
        m = _VARIABLE.fullmatch(text)
        if not m:
            raise Fault(f"{self.name}: cannot read the declaration {text!r}")
        space, align, type_, name, array, length, values = m.groups()
        if used is not None and name not in used:
            return
        item = type_bits(type_) // 8
        align, size = int(align or item), int(length or 0 if array else 1) * item
        if space == "shared":
            if array and not length:
                self.shared_variables[name] = None
                self.dynamic_alignment = max(self.dynamic_alignment, align)
            else:
                self.shared_variables[name] = _round_up(self.static_shared, align)
                self.static_shared = self.shared_variables[name] + size
        elif space == "local":
            self.local_variables[name] = _round_up(self.local_bytes, align)
            self.local_bytes = self.local_variables[name] + size
        else:
            self.data[name] = Data(_initial_bytes(name, type_, size, values), space == "global")


def _initial_bytes(name: str, type_: str, size: int, values: str | None) -> np.ndarray:
    item = type_bits(type_) // 8
    content = np.zeros(size + 16, np.uint8)
    # Over-aligned, so that every vector access that the declaration allows is aligned here too.
    content = content[-content.ctypes.data % 16 :][:size]
    typed = content.view(f"u{item}")
    for i, value in enumerate(operands.split((values or "").strip("{} \n\t"))):
        parsed = operands.parse(value, lambda _: None)
        if not isinstance(parsed, operands.Immediate):
            raise Fault(f"the variable {name} is initialised with {value}, which is no number")
        typed[i] = parsed.value & (1 << 8 * item) - 1
    return content


def _parameter(text: str) -> tuple[str, str, int]:
    m = _PARAMETER.match(text.strip())
    types = [word[1:] for word in m[1].split() if re.fullmatch(r"\.[busf]\d+", word)] if m else []
    if not types:
        raise Fault(f"cannot read the parameter {text.strip()!r}")
    if m[3]:
        return m[2], "b8", int(m[3]) * type_bits(types[0]) // 8
    return m[2], types[0], type_bits(types[0]) // 8


def _lookup(name: str, scopes) -> str | None:
    for _, known in reversed(scopes):
        if name in known:
            return known[name]
    return None


def _without_comments(text: str) -> str:
    """Remove comments and line markers, and keep every line's number."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^[ \t]*\.(?:loc|file)\b[^\n]*", "", text, flags=re.M)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for m in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if m[0] == "{" else -1
        if not depth:
            return m.start()
    raise Fault("the PTX ends within a kernel")


def _blank_bodies(text: str) -> str:
    """The module without the bodies of its entries, whose variables are their own."""
    pieces, at = [], 0
    for m in _ENTRY.finditer(text):
        pieces.append(text[at : m.start()])
        at = _closing_brace(text, m.end()) + 1
    return "".join([*pieces, text[at:]])


def _leading(body: str, begin: int) -> int:
    return re.compile(r"\s*").match(body, begin).end() - begin


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
