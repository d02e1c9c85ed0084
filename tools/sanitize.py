"""Run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources.

    python tools/sanitize.py [--isa NAME ...] [--skip-self-test]

The instrumented library is built in build/sanitize/tree, beside nothing that anybody imports; its objects are kept
there for the next run. Every instruction set that this CPU has is forced in turn ("cuda": the CUDA kernels, in their
emulator). At the end faults are planted in the copy: the tool must see them too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_tools"))
from toolchain import find_cxx  # noqa: E402

PLACE = ROOT / "build/sanitize"
COPIED = ("build_tools", "csrc", "hyperformer_fast", "tests", "setup.py", "pyproject.toml", "README.md")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
TESTS = (
    "test_cpu_backend.py", "test_cpu_hostile.py", "test_native.py", "test_ops.py", "test_registered_ops.py",
    "test_prepared_stack.py", "test_cpu_pieces.py", "test_cpu_attention.py", "test_pieces.py",
    "test_pieces_attention.py", "test_pieces_masks.py", "test_pieces_sweep.py", "test_linear_cross_entropy.py",
)  # fmt: skip
#: The CUDA kernels in the emulator.
EMULATED, EMULATED_TESTS = "cuda", ("test_cuda_emulated.py", "test_cuda_emulated_edges.py")
#: Deselected: nothing of the library's, and minutes where every allocation is watched.
SLOW = "not compile and not opcheck_generate and not first_import"
SWEEP = "60"


class Plant(NamedTuple):
    name: str
    file: str
    pattern: str
    replacement: str
    seen: str  #: what the report of it says
    isa: str | None = None


PLANTS = (
    Plant(
        "a store of floats one place too far",
        "csrc/cpu/isa/simd-inl.h",
        r"\*reinterpret_cast<vf_any\*>\(p\) = v;",
        "*reinterpret_cast<vf_any*>(p + 1) = v;",
        "ERROR: AddressSanitizer",  # "unknown-crash" where a wide store is only partly beyond the end
    ),
    Plant(
        "a read beyond the mask of an attention",
        "csrc/cpu/isa/softmax-inl.h",
        r"for \(; stride == 1 && j \+ kLanes <= n;",
        "for (; stride == 1 && j < n;",
        "ERROR: AddressSanitizer",  # as above
    ),
    Plant(
        "a CUDA thread's store beyond its row",
        "csrc/cuda/common.cuh",
        r"if \(column \+ i < d\) row\[column \+ i\] = part\[i\];",
        "row[column + i] = part[i];",
        "ERROR: AddressSanitizer: heap-buffer-overflow",
        EMULATED,
    ),
    Plant(
        "a signed overflow",
        "csrc/layout.h",
        r"int64_t numel\(\) const \{ return ",
        r"int64_t numel() const { volatile int64_t most = INT64_MAX; most = most + d; return ",
        "runtime error: signed integer overflow",
    ),
)

#: A forward and a backward whose last vector ends where the memory does.
SMALL = """
import torch
from hyperformer_fast import native, ops
from hyperformer_fast.layout import AdapterLayout
assert native.cpu_library() is not None, native.status()
layout = AdapterLayout(64, 16)
x = torch.randn(9, 64, requires_grad=True)
ops.adapter(x, torch.randn(1, layout.numel, requires_grad=True), layout, "gelu_new").sum().backward()
ops.softmax_dropout(torch.randn(1, 1, 1, 9), mask=torch.ones(9, dtype=torch.bool))
"""


#: The same in the emulator.
SMALL_EMULATED = """
import torch
from support.emulated import EmulatedCuda
from hyperformer_fast.layout import AdapterLayout, AdapterSpec
layout = AdapterLayout(61, 3)
folded = EmulatedCuda().fold(torch.randn(1, layout.numel), layout, torch.float32)
EmulatedCuda().adapter_forward(torch.randn(9, 61), folded, AdapterSpec(layout, "relu"), None, False)
"""


def runtime(name: str) -> str:
    command = [*(find_cxx() or ["g++"]), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment(tree: Path, logs: Path, isa: str | None = None) -> dict[str, str]:
    logs.mkdir(parents=True, exist_ok=True)
    # libstdc++ too: AddressSanitizer looks for __cxa_throw at start-up, when nothing has asked for it yet.
    libraries = " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so")))
    # Reports go to files: pytest holds stderr when a process dies.
    made = {
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:log_path={logs}/address",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={logs}/undefined",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "tests"))),
        "OMP_NUM_THREADS": "2",
    }
    if isa == EMULATED:
        return {**os.environ, **made, "HFF_EMULATOR_FLAGS": FLAGS}
    made["HYPERFORMER_FAST_SWEEP_EXAMPLES"] = made["HYPERFORMER_FAST_PIECES_EXAMPLES"] = SWEEP
    if isa:
        made["HYPERFORMER_FAST_CPU_ISA"] = isa
    return {**os.environ, **made}


def copy_sources(tree: Path) -> None:
    """Make ``tree`` a copy of the sources. What did not change keeps its time there, and with it its objects."""

    def copy_changed(source: str, target: str) -> None:
        if not os.path.exists(target) or Path(source).read_bytes() != Path(target).read_bytes():
            shutil.copyfile(source, target)

    tree.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("*.so", "build_info.json", "live_check.json", "__pycache__", "build")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore, copy_function=copy_changed, dirs_exist_ok=True)
            for made in (tree / name).rglob("*"):
                if made.is_file() and not (ROOT / made.relative_to(tree)).exists():
                    made.unlink()
        else:
            copy_changed(str(ROOT / name), str(tree / name))


def compile_library(tree: Path) -> None:
    flags = {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -O1 -g {FLAGS}", "HYPERFORMER_FAST_BUILD": "cpu"}
    flags["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} {FLAGS}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env={**os.environ, **flags}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the instrumented build failed:\n{done.stderr[-4000:]}")


def usable_sets(tree: Path, logs: Path) -> list[str]:
    """The instruction sets of this CPU, as the library itself says."""
    listing = "from hyperformer_fast.backends.cpu import INSTRUCTION_SETS; print(*INSTRUCTION_SETS)"
    probe = (
        "from hyperformer_fast import native; from hyperformer_fast.backends.cpu import CpuBackend\n"
        f"assert native.__file__.startswith({str(tree)!r}), native.__file__\n"
        "assert any('asan' in line for line in open('/proc/self/maps')), 'no sanitizer in this process'\n"
        "print(CpuBackend().availability().reason or 'usable')"
    )

    def says(code: str, isa: str | None = None) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tree, env=environment(tree, logs, isa), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the instrumented library cannot be asked:\n{done.stderr[-2000:]}{reports(logs)}")
        return done.stdout.strip()

    found = []
    for isa in (*says(listing).split(), EMULATED):
        answer = "usable" if isa == EMULATED else says(probe, isa)
        if answer == "usable":
            found.append(isa)
        else:
            print(f"sanitize: not {isa}: {answer}", flush=True)
    if not found:
        raise SystemExit("sanitize: the instrumented library serves no instruction set")
    return found


def reports(logs: Path) -> str:
    """What was found. A memory request that was refused, as tests make it, is a mere warning there."""
    found = [(path.name, path.read_text()) for path in sorted(logs.glob("*.*"))]
    return "".join(f"\n{n}:\n{text[:6000]}" for n, text in found if "ERROR:" in text or "runtime error:" in text)


def run_tests(tree: Path, logs: Path, isa: str) -> bool:
    print(f"sanitize: {isa}", flush=True)
    shutil.rmtree(logs, ignore_errors=True)
    names = EMULATED_TESTS if isa == EMULATED else TESTS
    tests = [str(tree / "tests" / name) for name in names if (tree / "tests" / name).exists()]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", SLOW]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=tree, env=environment(tree, logs, isa))
    # A report counts even where the tests pass: a test may await the failure of a process of its own.
    found = reports(logs)
    print(f"sanitize: {isa}: {'clean' if not (done.returncode or found) else 'FAILED' + found}", flush=True)
    return not (done.returncode or found)


def self_test() -> bool:
    """Whether each planted fault is reported."""
    tree, logs, good = PLACE / "tree", PLACE / "planted-logs", True
    for plant in PLANTS:
        copy_sources(tree)
        file = tree / plant.file
        text, count = re.subn(plant.pattern, plant.replacement, file.read_text())
        if not count:
            raise SystemExit(f"sanitize: there is no {plant.pattern} in {plant.file}: plant {plant.name!r} elsewhere")
        file.write_text(text)
        compile_library(tree)
        shutil.rmtree(logs, ignore_errors=True)
        command = [sys.executable, "-c", SMALL_EMULATED if plant.isa == EMULATED else SMALL]
        done = subprocess.run(command, cwd=tree, env=environment(tree, logs, plant.isa), capture_output=True, text=True)
        caught = done.returncode != 0 and plant.seen in done.stderr + reports(logs)
        print(f"sanitize: {plant.name}: {'caught' if caught else 'MISSED'}", flush=True)
        if not caught:
            print(f"exit status {done.returncode}\n{done.stderr[-2000:]}{reports(logs)}", flush=True)
        good = good and caught
    copy_sources(tree)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="*", help="only these instruction sets (default: all that this CPU has)")
    parser.add_argument("--skip-self-test", action="store_true", help="plant no faults")
    parser.add_argument("--only-self-test", action="store_true", help="plant faults, run no tests")
    options = parser.parse_args()
    good, tree, logs = True, PLACE / "tree", PLACE / "logs"
    if not options.only_self_test:
        copy_sources(tree)
        compile_library(tree)
        usable = usable_sets(tree, logs)
        for isa in options.isa or usable:
            good = run_tests(tree, logs, isa) and good
    if not options.skip_self_test:
        good = self_test() and good
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
