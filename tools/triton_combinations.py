"""Whether the Triton kernels compile without spills, with several versions of Triton and for all architectures.

    python tools/triton_gate.py --triton DIR... [--write] [--arch 80 90 100]

Each DIR is a folder into which ``pip install --no-deps --target DIR triton==VERSION`` put a version; ``.`` stands for
the one that is installed. A child process for each version and architecture compiles the kernels of T5-base in
combinations of x's dtype, the master weights' dtype, norms, alignment and mixed tasks in which every pair of two
settings occurs, and those of the fold for wide bottlenecks, too. Two children run at a time.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import records

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
RECORD = "triton_combinations"

#: What a call of the kernels may differ in, beside its shape: the arguments of ``triton_gate.launches_of``.
SETTINGS = {
    "dtype": ("bf16", "fp16", "fp32", "tf32"),
    "masters": ("fp32", "bf16", "fp16"),
    "pre_norm": (False, True),
    "post_norm": (True, False),
    "aligned": (True, False),
    "mixed": (True, False),
}


def covering() -> Iterator[dict[str, object]]:
    """Combinations of ``SETTINGS`` in which every two values of two settings occur together: the first of all
    combinations that adds most, again and again."""
    names = list(SETTINGS)
    everything = list(itertools.product(*SETTINGS.values()))

    def pairs(values) -> set:
        return set(itertools.combinations(zip(names, values), 2))

    left = set().union(*map(pairs, everything))
    while left:
        best = max(everything, key=lambda values: len(pairs(values) & left))
        left -= pairs(best)
        yield dict(zip(names, best))


@dataclasses.dataclass
class Outcome:
    """How often one kernel was compiled, and what went wrong."""

    kernel: str
    arch: int
    combination: str
    problem: str  #: empty if there is none


#: Further shapes for kernels whose products depend on the bottleneck alone.
WIDE = ("large/16", "large/8")
WIDE_KERNELS = ("gram", "fold")


def sweep(arch: int, combinations=None) -> Iterator[Outcome]:
    """Compile the kernels for ``arch`` with the Triton of this process; code that several combinations share is
    compiled once."""
    import triton_gate as gate
    from triton_launches import compile_launch, signature_of

    seen = set()
    combinations = list(covering()) if combinations is None else combinations
    work = [("base", settings) for settings in combinations] + [(shape, combinations[0]) for shape in WIDE]
    for shape, settings in work:
        named = {name: value for name, value in settings.items() if name not in ("dtype", "masters", "pre_norm")}
        d, b, _ = gate.SHAPES[shape]
        with gate.matmul_precision("tf32" if settings["dtype"] == "tf32" else "ieee"):
            launches = gate.launches_of(
                d, b, gate.DTYPES[settings["dtype"]], arch, settings["pre_norm"],
                masters=gate.DTYPES[settings["masters"]], **named,
            )  # fmt: skip
        for launch in launches:
            name = launch.kernel.__name__.removesuffix("_kernel")
            key = repr((name, *signature_of(launch), launch.options))
            if key in seen or (shape in WIDE and name not in WIDE_KERNELS):
                continue
            seen.add(key)
            try:
                measured = gate.measure(compile_launch(launch, arch), arch)
                spilled = measured["stack"] or measured["spills"]
                problem = f"{measured['stack']} bytes of stack, {measured['spills']} spills" if spilled else ""
            except Exception as error:
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            described = ", ".join([shape, *(f"{n}={v}" for n, v in settings.items())])
            yield Outcome(name, arch, described, problem)


def child(folder: Path, arch: int) -> dict[str, object]:
    """Run :func:`sweep` with the Triton in ``folder``, and print problems as they come. Returns a row of the table."""
    start, tools = time.monotonic(), Path(__file__).parent
    path = [str(tools.parent), str(tools), os.environ.get("PYTHONPATH", "")]
    if folder != Path("."):
        path.insert(0, str(folder.resolve()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), str(arch)]
    version, compiled, problems = str(folder), 0, []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for number, line in enumerate(process.stdout):
            if number == 0:
                version = line.strip()
                continue
            outcome, compiled = Outcome(**json.loads(line)), number
            if outcome.problem:
                problems.append(f"{outcome.kernel} ({outcome.combination}): {outcome.problem}")
                print(f"triton {version}, sm_{arch}: {problems[-1]}", flush=True)
            if number % 10 == 0:
                print(f"triton {version}, sm_{arch}: {number} compiled", flush=True)
    if process.returncode:
        problems.append(f"the compiler ended with exit status {process.returncode}")
    print(f"triton {version}, sm_{arch}: all {compiled} in {time.monotonic() - start:.0f} s, {len(problems)} problems")
    return {"triton": version, "arch": arch, "kernels": compiled, "problems": "; ".join(problems) or "none"}


def main(folders: list[Path], architectures: list[int] | None, write: bool) -> int:
    """Compile everything. Returns 1 if anything failed or spilled.

    What is recorded keeps the rows of other versions and architectures, and is written after each row, because all
    together take an hour."""
    table = {(row["triton"], row["arch"]): row for row in records.read(RECORD)} if write else {}
    command, faulty = "python tools/triton_gate.py --triton DIR... --write", False
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        work = itertools.product(folders, architectures or ARCHITECTURES)
        for done in concurrent.futures.as_completed([pool.submit(child, *each) for each in work]):
            row = done.result()
            faulty |= row["problems"] != "none"
            table[row["triton"], row["arch"]] = row
            if write:
                rows = [table[key] for key in sorted(table)]
                records.write(RECORD, "With which versions of Triton the kernels compile", command, rows)
    return int(faulty)


if __name__ == "__main__":
    import triton

    print(triton.__version__, flush=True)
    for found in sweep(int(sys.argv[1])):
        print(json.dumps(dataclasses.asdict(found)), flush=True)
