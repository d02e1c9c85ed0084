"""IEEE arithmetic for the kernels, whatever flags a user, a site or a compiler's configuration adds.

The kernels tell NaN from numbers, add in an order that cancels as they expect, and split numbers into parts; under
-ffast-math they are silently 1 to 10 % wrong. So the flags that make it are undone after the user's;
csrc/require_ieee.h refuses what is still on in a C++ compiler, and this module what that cannot see: nvcc's flags and
the linker's start-up code. A library that is wrong all the same fails its test at the first load
(hyperformer_fast/backends/trust.py).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from plan import BuildError

HEADER = Path(__file__).resolve().parents[1] / "csrc/require_ieee.h"

#: Each sub-flag by name too: a user may have given it by itself. The last two are the kernels' own choice, which
#: -fno-fast-math would otherwise take back: fused multiply-adds, and no errno.
_BOTH = [
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
    "-ffp-contract=fast",
    "-fno-math-errno",
]
_ONLY = {"clang": ["-fno-approx-func", "-fdenormal-fp-math=ieee"], "gcc": ["-fno-single-precision-constant"]}

#: As nvcc hands them to its device compiler. --use_fast_math defines no macro that a source could refuse.
_NVCC_FAST = re.compile(r"\s(-fast-math|-?-ftz=1|-?-prec_div=0|-?-prec_sqrt=0)\b")


def without_ofast(words: Sequence[str]) -> list[str]:
    """-O3 for -Ofast, whose fast start-up code at the link no other flag undoes."""
    return ["-O3" if word == "-Ofast" else word for word in words]


def ieee_flags(cxx: Sequence[str]) -> list[str]:
    """What to put after the user's flags, for the C++ compiler that the command ``cxx`` starts."""
    macros = _says([*cxx, "-dM", "-E", "-x", "c++", "/dev/null"])
    return [*_BOTH, *_ONLY["clang" if "__clang__" in macros else "gcc"], "-include", str(HEADER)]


def refuse_fast_start(link: Sequence[str]) -> None:
    """BuildError where this link would add crtfastmath.o, which switches subnormal numbers off in whoever loads it."""
    if "crtfastmath" in _says([*link, "-x", "c++", "/dev/null", "-###"]):
        raise BuildError(
            "the linker's flags switch subnormal numbers off in every process that loads the library: "
            "remove -ffast-math, -funsafe-math-optimizations and -mdaz-ftz from LDFLAGS and CXX"
        )


def refuse_fast_nvcc(command: Sequence[str]) -> None:
    """BuildError where nvcc would compile with other than IEEE division, roots and subnormal numbers."""
    found = _NVCC_FAST.search(_says([*command, "--dryrun", "-c", "any.cu", "-o", "any.o"]))
    if found:
        raise BuildError(
            f"nvcc's flags turn IEEE arithmetic off ({found[1]}): remove --use_fast_math, -ftz=true, -prec-div=false "
            "and -prec-sqrt=false from NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS"
        )


def _says(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    return done.stdout
