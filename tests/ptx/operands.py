"""What an instruction's operands are: registers, immediate values, addresses and vectors of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from .fault import Fault


@dataclasses.dataclass(frozen=True)
class Register:
    name: str  #: unique in the kernel: registers of an inner scope carry the scope's number


@dataclasses.dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as ``%tid.x``."""

    name: str


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or a floating-point number's bits as ``0f`` and ``0d`` spell them."""

    value: int
    float_bits: int = 0  #: 32 or 64 where the value holds the bits of a float; 0 for an integer


@dataclasses.dataclass(frozen=True)
class Symbol:
    """The address of a variable (plus a number of bytes), a parameter's name or a label."""

    name: str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    elements: tuple


@dataclasses.dataclass(frozen=True)
class Pair:
    """``%p|%q``: two destinations."""

    first: object
    second: object


@dataclasses.dataclass(frozen=True)
class Negated:
    """``!%p``."""

    register: Register


class Sink:
    """``_``: a destination that drops what it is given."""

    def __repr__(self):
        return "_"


SINK = Sink()

_NAME = r"%?[\w$]+(?:\.[xyz])?"
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_FLOAT_BITS = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
_SUM = re.compile(rf"({_NAME})\s*(?:\+\s*(-?\w+))?")
_SPECIAL = re.compile(
    r"%(?:(?:n?tid|n?ctaid)\.[xyz]|laneid|n?warpid|lanemask_(?:eq|lt|le|gt|ge)|dynamic_smem_size|total_smem_size"
    r"|smid|nsmid|gridid|clock(?:64|_hi)?|globaltimer(?:_lo|_hi)?|clusterid\.[xyz]|cluster_ctarank|is_explicit_cluster)"
)


def integer(text: str) -> int:
    text = text.rstrip("U")
    # PTX writes octal numbers with a leading zero, as C does.
    octal = re.fullmatch(r"(-?)0([0-7]+)", text)
    return int(octal[1] + octal[2], 8) if octal else int(text, 0)


def split(text: str) -> list[str]:
    """Split an instruction's operands at the commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def parse(text: str, register: Callable[[str], str | None]):
    """Parse one operand; ``register`` gives a register's unique name, or None where the name is no register."""
    text = text.strip()
    if name := register(text):
        return Register(name)
    if text == "_":
        return SINK
    if _INTEGER.fullmatch(text):
        return Immediate(integer(text))
    if bits := _FLOAT_BITS.fullmatch(text):
        return Immediate(int(bits[1] or bits[2], 16), 32 if bits[1] else 64)
    if text[0] == "[":
        return _address(text[1:-1].strip(), register)
    if text[0] == "{":
        return Vector(tuple(parse(part, register) for part in split(text[1:-1])))
    if text[0] == "!":
        return Negated(parse(text[1:], register))
    if "|" in text:
        first, second = text.split("|")
        return Pair(parse(first, register), parse(second, register))
    if _SPECIAL.fullmatch(text):
        return Special(text)
    if (sum_ := _SUM.fullmatch(text)) and not text.startswith("%"):
        return Symbol(sum_[1], integer(sum_[2] or "0"))
    raise Fault(f"cannot read the operand {text!r}")


def _address(inner: str, register) -> Address:
    if _INTEGER.fullmatch(inner):
        return Address(Immediate(integer(inner)))
    parts = _SUM.fullmatch(inner)
    if not parts:
        raise Fault(f"cannot read the address [{inner}]")
    name = register(parts[1])
    if name is None and parts[1].startswith("%"):
        raise Fault(f"the address [{inner}] is based on {parts[1]}, which is no register of this kernel")
    return Address(Register(name) if name else Symbol(parts[1]), integer(parts[2] or "0"))
