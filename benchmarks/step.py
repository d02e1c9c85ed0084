"""Time a whole step of a T5: bare, with the authors' adapters and with ours, each fused and unfused.

    python benchmarks/step.py [--minutes 12] [--only PATTERN ...] [--resume] [--list] [--output DIR]

A group is one shape, dtype and pass. All rows of a group take turns in one process, and a row's ratio to the bare T5 is
the median over the rounds, with the quartiles in brackets. Before it is timed, each row is compared with the bare T5 or
with the adapted T5 on the reference backend: loss and a gradient, without dropout. Training groups also say what the
time goes to (torch's profiler), what autograd keeps for the backward and how far the allocations rise.

Each group is written as soon as it is measured. A run replaces the groups that it measures in the file; ``--resume``
leaves out those that are there. A group for which no time is left is named, and another run with ``--resume`` takes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from plots import draw
from step_cases import CASES, Case, default_cases
from step_measure import measure
from step_models import BARE, Step, step, steps
from timing import arguments, machine, show, slug, write

__all__ = ["BARE", "Step", "main", "step", "steps"]


def chosen(only: list[str] | None) -> dict[str, Case]:
    """The cases by their names: those that are measured by default, or all whose names fit a pattern."""
    usual = default_cases()
    if not only:
        return usual
    found = {
        name: usual.get(name, case) for name, case in CASES.items() if any(fnmatch(name, pattern) for pattern in only)
    }
    if not found:
        raise SystemExit(f"no group fits {' or '.join(only)}; --list names all {len(CASES)}")
    return found


def earlier(path: Path, where: dict[str, str]) -> dict:
    """The groups that are in the file already, where it is of this machine."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["results"] if found["machine"] == where else {}


def table(name: str, group: dict, where: dict[str, str]) -> None:
    """Print the ratios, the components and the memory of a group."""
    rows = []
    for row, found in group["rows"].items():
        low, high = found["quartiles"]
        memory = [f"{group['memory'][row][kind]:.2f}" if row in group["memory"] else "" for kind in ("saved", "peak")]
        rows.append((row, f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]", *memory))
    show(f"{name}: {group['rounds']} rounds", where, ("", "time over bare", "kept for the backward", "peak"), rows)
    parts = list(dict.fromkeys(part for found in group["components"].values() for part in found))
    if parts:
        shown = [(row, *(f"{found.get(part, 0):.3f}" for part in parts)) for row, found in group["components"].items()]
        show("components, in times of the bare step", where, ("", *parts), shown)
    for row, why in group["absent"].items():
        print(f"not measured: {row}: {why}")


def run(cases: dict[str, Case], seconds: float | None, rounds: int) -> Iterator[tuple[str, dict]]:
    """Measure the cases one after another, each with its share of the seconds that are left."""
    end = None if seconds is None else time.perf_counter() + seconds
    waiting = dict(cases)
    for name, case in cases.items():
        left = None if end is None else end - time.perf_counter()
        if left is not None and left <= 0:
            print(f"not measured: {', '.join(waiting)}: no time is left; --resume measures them")
            return
        share = case.share / sum(each.share for each in waiting.values())
        yield name, measure(case, None if left is None else left * share, rounds)
        del waiting[name]


def main() -> None:
    parser = arguments(__doc__, rounds=3, quick="one block and short inputs, one round")
    parser.add_argument("--minutes", type=float, default=12, help="for all groups together (default: 12)")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="groups by name, such as 'T5-base *bf16*'")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    parser.add_argument("--list", action="store_true", help="name all groups; those with a star are the default")
    parser.add_argument("--name", default="step", help="start of the file's name (default: step)")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{'*' if name in default_cases() else ' '} {name}" for name in CASES))
        return
    where = machine()
    path = options.output / f"{options.name}-{slug(where)}.json"
    results = earlier(path, where)
    cases = chosen(options.only)
    if options.resume:
        cases = {name: case for name, case in cases.items() if name not in results}
    seconds, rounds = 60 * options.minutes, options.rounds
    if options.quick:
        cases, seconds, rounds = {name: case.tiny() for name, case in cases.items()}, None, 1
    wrong = []
    for name, group in run(cases, seconds, rounds):
        results[name] = group
        table(name, group, where)
        write(options.name, where, results, options.output)
        wrong += [f"{name}, {row}: {why}" for row, why in group.get("wrong", {}).items()]
    if results:
        draw(path)
    if wrong:
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
