"""Faults to plant in PTX, in the text of any kernel of any compiler, to see that the interpreter finds them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault. ``pattern`` finds the instructions that can be spoilt, and ``spoil`` changes one of them."""

    name: str
    pattern: str
    spoil: Callable[[re.Match], str]

    def places(self, text: str) -> list[int]:
        """The lines of ``text``, counted from 1, whose instruction can be spoilt."""
        return [text.count("\n", 0, match.start()) + 1 for match in re.finditer(self.pattern, text, re.MULTILINE)]

    def planted(self, text: str, line: int) -> str:
        """``text`` with the fault in this line."""
        lines = text.split("\n")
        spoilt, count = re.subn(self.pattern, self.spoil, lines[line - 1], count=1)
        assert count and spoilt != lines[line - 1], f"line {line} was not changed: {lines[line - 1]}"
        return "\n".join([*lines[: line - 1], spoilt, *lines[line:]])


_REGISTER = r"\s*%\w+\s*"

#: Without a barrier, warps read what others have not written yet, or write what others still read.
NO_BARRIER = Fault("no barrier", r"^[ \t]*(?:bar|barrier)\.sync\b[^;]*;", lambda m: "")
#: The first two registers of A's fragment exchanged: two rows change places.
FRAGMENT = Fault(
    "a wrong fragment register",
    rf"(mma\.sync[^{{]*\{{[^}}]*\}}\s*,\s*\{{)({_REGISTER}),({_REGISTER})",
    lambda m: f"{m[1]}{m[3]},{m[2]}",
)
#: A wait that lets one more group of copies stay under way.
WAIT = Fault(
    "a wait group too large", r"cp\.async\.wait_group\s+(0x)?(\d+)", lambda m: f"cp.async.wait_group {int(m[2]) + 1}"
)
#: A group of copies that is never closed, so that the wait for it does not cover it.
NO_COMMIT = Fault("no commit", r"^[ \t]*cp\.async\.commit_group\s*;", lambda m: "")
#: Every lane reads one lane instead of its partner.
LANE = Fault("a wrong lane", r"shfl\.sync\.bfly\.b32", lambda m: "shfl.sync.idx.b32")
#: A store that also happens where its mask is off.
NO_MASK = Fault("a store without its mask", r"^[ \t]*@!?%p\d+(\s+st\.global)", lambda m: m[1])
#: A store beside its place: half a MiB further.
ADDRESS = Fault(
    "a wrong address",
    r"(st\.global\S*\s*\[\s*%\w+)(?:\s*\+\s*\d+)?\s*\]",
    lambda m: f"{m[1]}+524288]",
)
