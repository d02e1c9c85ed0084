"""Time and test everything on a GPU, in one command.

    python benchmarks/gpu_report.py [--parts kernels adapter ...] [--build] [--limit SECONDS] [--output DIR] [--dry-run]
    python benchmarks/gpu_report.py --warm DIR --arch 90 [--keyed-for DIR]      # on a machine without a GPU

Each part runs in a process of its own, with its own limit; one that crashes or hangs is killed with everything that it
started, and the next one runs. What a part measures is printed and written to the JSON file at once, so that a run that
is cut off leaves all that was measured. Numbers come first; what only looks for faults comes last. Whatever is timed is
checked in the same run, and has no number if it is wrong. The exit code is 1 if anything failed.

A report needs torch and one of our backends. What else is missing (the CUDA library, nvcc, compute-sanitizer,
`adapters`) is named and left out. ``--build`` first compiles the CUDA library for this GPU alone. ``--dry-run`` walks
through all parts on the CPU with tiny inputs, and counts what a real run compiles. ``--warm`` compiles the Triton
kernels into a folder that can be carried to a GPU machine and named there by TRITON_CACHE_DIR
(docs/performance.md#on-a-gpu).

Each part's results have a ``status`` (done, failed, crashed, timed out, skipped), seconds, and ``entries`` in the order
in which they came. An entry has a ``line`` for people, numbers, and, where they apply, ``absent``, ``wrong`` or
``failed`` with reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this folder
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu import children, planted
from gpu.plan import LIMIT, PARTS

from hyperformer_fast import atomic

RESULTS = Path(__file__).resolve().parent / "results"
#: A part is skipped if fewer seconds are left for it.
LEAST = 3


class Report:
    """The results so far, as a file that is always whole.

    Args:
        folder: where the file is written; its name says which machine it is from as soon as that is known.
    """

    def __init__(self, folder: Path):
        self.folder, self.machine, self.results = folder, {}, {}
        self.path = folder / "gpu-report-unknown.json"
        folder.mkdir(parents=True, exist_ok=True)

    def name(self, where: dict[str, str], slug: str) -> None:
        self.path.unlink(missing_ok=True)
        self.machine, self.path = where, self.folder / f"gpu-report-{slug}.json"

    def write(self) -> None:
        with atomic.write_file(self.path) as partial:
            partial.write_text(json.dumps({"machine": self.machine, "results": self.results}, indent=1) + "\n")

    def failures(self) -> list[str]:
        """One line for each part and each entry that failed."""
        found = []
        for name, part in self.results.items():
            if part["status"] != "done":
                found.append(f"{name}: {part['status']}: {part['detail']}")
            for entry in part["entries"]:
                if "failed" in entry:
                    found.append(f"{name}: {entry['line']}")
                for what, why in entry.get("wrong", {}).items():
                    found.append(f"{name}: wrong: {what}: {why}")
        return list(dict.fromkeys(found))

    def absent(self) -> list[str]:
        """What was not measured, and why."""
        return list(dict.fromkeys(
            f"{what}: {why}"
            for part in self.results.values()
            for entry in part["entries"]
            for what, why in entry.get("absent", {}).items()
        ))  # fmt: skip


def run_part(name: str, options: argparse.Namespace, report: Report, limit: float, elapsed) -> None:
    """Run one part, and keep each entry as it comes."""
    found = report.results[name] = {"status": "running", "limit": round(limit), "entries": []}

    def keep(entry: dict) -> None:
        if "compiled" in entry:
            found["compiled"] = entry["compiled"]
            return
        found["entries"].append(entry)
        if "slug" in entry:
            report.name(entry["where"], entry["slug"])
            options.arch = entry.get("arch", options.arch)
        report.write()
        print(f"[{elapsed():5.0f} s] {name}: {entry['line']}", flush=True)

    passed = {
        "device": "cpu" if options.dry_run else options.device, "dry_run": options.dry_run, "limit": limit,
        "backend": PARTS[name].backend, "arch": options.arch, "plant": options.plant.get(name),
    }  # fmt: skip
    command = [sys.executable, "-m", "gpu.child", name, json.dumps(passed)]
    ended = children.run(command, limit, keep)
    found |= {"status": ended.status, "seconds": ended.seconds, "detail": ended.detail}
    if ended.status != "done":
        found["said"] = ended.said
    compiled = found.get("compiled", {}).get("ours")
    more = f"; {compiled['compiled']} kernels compiled in {compiled['seconds']:.0f} s" if compiled else ""
    print(f"[{elapsed():5.0f} s] {name}: {ended.status} after {ended.seconds} s {ended.detail}{more}", flush=True)
    if ended.status != "done":
        print(*(f"    {line}" for line in ended.said.strip().splitlines()[-8:]), sep="\n", flush=True)
    report.write()


def pair(text: str) -> tuple[str, str]:
    """``part=value`` of the command line."""
    name, sign, value = text.partition("=")
    if not sign or name not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not PART=VALUE with a part of {', '.join(PARTS)}")
    return name, value


def parse() -> argparse.Namespace:
    parts = "\n".join(f"  {name:13}{part.budget:4} s  {part.what}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts, with their budgets:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these parts, and the machine's description")
    parser.add_argument("--build", action="store_true", help="compile the CUDA library first")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"of it all (default: {LIMIT})")
    parser.add_argument(
        "--budget", nargs="+", type=pair, default=[], metavar="PART=SECONDS", help="another limit of a part"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument(
        "--warm", type=Path, metavar="DIR", help="compile the Triton kernels into this folder, and exit"
    )
    parser.add_argument("--arch", type=int, default=90, help="the architecture for --warm (default: 90)")
    parser.add_argument(
        "--keyed-for", type=Path, metavar="DIR",
        help="--warm for the build of the same Triton whose wheel is unpacked in DIR, as of another version of Python",
    )  # fmt: skip
    parser.add_argument("--plant", nargs="+", type=pair, default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.budget, options.plant = dict(options.budget), dict(options.plant)
    try:
        options.budget = {name: float(seconds) for name, seconds in options.budget.items()}
    except ValueError as error:
        parser.error(f"--budget: {error}")
    if unknown := set(options.plant.values()) - set(planted.KINDS):
        parser.error(f"--plant: the kind must be one of {', '.join(planted.KINDS)}, got {', '.join(unknown)}")
    return options


def warm(folder: Path, arch: int, other: Path | None) -> int:
    """Compile the Triton kernels into ``folder``; returns the exit code."""
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), **children.environment()}
    from gpu.compilation import warm as compiled

    code = 0
    for entry in compiled(arch, 3600, other):
        print(entry["line"], *filter(None, [entry.get("failed")]), flush=True)
        code = code or int("failed" in entry)
    return code


def plot(path: Path) -> None:
    """Draw what can be drawn; a plot that fails is no failure of the report."""
    command = [sys.executable, str(Path(__file__).with_name("plots.py")), str(path)]
    try:
        done = subprocess.run(command, env=children.environment(), capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        print(f"no plot: {error}", flush=True)
    else:
        print(children.last_line(done.stdout + done.stderr, done.returncode), flush=True)


def main() -> int:
    options = parse()
    if options.warm:
        return warm(options.warm, options.arch, options.keyed_for)
    start = time.monotonic()
    elapsed = lambda: time.monotonic() - start  # noqa: E731
    report = Report(options.output)
    chosen = ["machine"] + [
        name for name, part in PARTS.items()
        if name != "machine" and (name in options.parts if options.parts else not part.asked or options.build)
    ]  # fmt: skip
    with children.killed_is_exit():
        for name in chosen:
            limit = min(options.budget.get(name, PARTS[name].budget), options.limit - elapsed())
            if limit < LEAST:
                report.results[name] = {"status": "skipped", "detail": "no time is left", "entries": []}
                continue
            run_part(name, options, report, limit, elapsed)
            if name == "machine" and report.results[name]["status"] != "done":
                break
    report.write()
    if any("forward_of_copy_bandwidth" in entry for part in report.results.values() for entry in part["entries"]):
        plot(report.path)
    print(f"\n{'part':13} {'status':10} {'seconds':>8} {'entries':>8}")
    for name, part in report.results.items():
        print(f"{name:13} {part['status']:10} {part.get('seconds', 0):8.0f} {len(part['entries']):8}")
    print(*(f"not measured: {line}" for line in report.absent()), sep="\n")
    failures = report.failures()
    print(*(f"FAILED: {line}" for line in failures), report.path, sep="\n", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
