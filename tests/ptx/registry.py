"""Which function decodes which instruction.

A decoder takes the machine and a statement, once, and returns the step that carries the instruction out: a function of
a mask that is True for all lanes, or a boolean array with True for the lanes that take part. numpy's ufuncs take both
as ``where=``. A decoder refuses whatever modifier it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .fault import Fault
from .parse import Statement

Step = Callable[[object], None]
DECODERS: dict[str, Callable] = {}

#: Instructions that all lanes named by a mask, or all lanes of the warp, must carry out together.
WARP_WIDE = {"shfl", "vote", "match", "redux", "ldmatrix", "stmatrix", "mma", "wgmma", "elect"}

_TYPE = re.compile(r"[busf](?:8|16|32|64)|bf16|f16x2|bf16x2|tf32|pred")


def instruction(*opcodes: str):
    def note(decoder):
        for opcode in opcodes:
            if opcode in DECODERS:
                raise ValueError(f"{opcode} has two decoders")
            DECODERS[opcode] = decoder
        return decoder

    return note


class Modifiers:
    """A statement's modifiers, to be taken one by one; ``done`` refuses what is left."""

    def __init__(self, statement: Statement):
        self.left = list(statement.modifiers)

    def take(self, *choices: str) -> str | None:
        """Take and return the first of ``choices`` that is there, or None."""
        for choice in choices:
            if choice in self.left:
                self.left.remove(choice)
                return choice
        return None

    def need(self, *choices: str) -> str:
        found = self.take(*choices)
        if found is None:
            raise Fault(f"expected one of the modifiers {', '.join('.' + c for c in choices)}")
        return found

    def flag(self, name: str) -> bool:
        return self.take(name) is not None

    def ignore(self, *patterns: str) -> None:
        """Drop modifiers that change nothing but speed, or an order that this interpreter keeps anyway."""
        self.left = [m for m in self.left if not any(re.fullmatch(p, m) for p in patterns)]

    def types(self, count: int) -> list[str]:
        """Take the types at the end."""
        found = [m for m in self.left if _TYPE.fullmatch(m)]
        if len(found) != count or self.left[len(self.left) - count :] != found:
            raise Fault(f"expected {count} type(s) at the end of the modifiers .{'.'.join(self.left)}")
        del self.left[len(self.left) - count :]
        return found

    def type(self, *allowed: str) -> str:
        (found,) = self.types(1)
        if allowed and found not in allowed:
            raise Fault(f"the type .{found} is not known here, only .{', .'.join(allowed)}")
        return found

    def done(self) -> None:
        if self.left:
            raise Fault(f"the modifier .{self.left[0]} is not known here")


def expect(statement: Statement, *counts: int) -> None:
    """Refuse another number of operands."""
    if len(statement.operands) not in counts:
        raise Fault(f"expected {' or '.join(map(str, counts))} operands, not {len(statement.operands)}")
