"""A shared library from compile commands: through ninja, which compiles only what changed, else directly.

The library, the tests' emulator and the sanitizers' builds all come here, each configuration with a folder of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from plan import BuildError

ROOT = Path(__file__).resolve().parents[1]
#: Persistent, unlike the temporary folder that pip gives an editable build.
CACHE = ROOT / "build/objects"
#: Variables that change what g++, clang++ and nvcc make of one and the same command.
COMPILER_VARIABLES = (
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "COMPILER_PATH",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
)


class Unit(NamedTuple):
    """One source file and the command that compiles it, without its source, output and dependency file."""

    source: Path
    command: Sequence[str]


class Link(NamedTuple):
    """The linker's command: what precedes the objects, and what follows them."""

    before: Sequence[str]
    after: Sequence[str]


def find_ninja(environ: Mapping[str, str] = os.environ) -> str | None:
    """The ninja beside this interpreter (where its wheel puts it, on PATH or not), else the first on PATH."""
    beside = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    return shutil.which("ninja", path=os.pathsep.join(beside)) or shutil.which("ninja", path=environ.get("PATH"))


def build_library(
    name: str,
    units: Sequence[Unit],
    link: Link,
    inputs: Iterable[Path],
    facts: Sequence[str],
    jobs: int,
    cache: Path = CACHE,
) -> Path:
    """Compile ``units``, ``jobs`` at once, and link them; BuildError quotes the compiler.

    Args:
        name: of the library, without suffix.
        inputs: every file of ours that the units may read.
        facts: what else the objects depend on: the versions of the compilers and of torch.
        cache: the folder that holds one folder of objects per configuration.

    Returns:
        The library, in its configuration's folder.
    """
    variables = [os.environ.get(variable, "") for variable in COMPILER_VARIABLES]
    commands = [[str(unit.source), *unit.command] for unit in units]
    folder = cache / f"{name}-{_digest(json.dumps([commands, link, list(facts), variables]).encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    with _locked(folder) as lock:
        changed = _note_contents(folder, inputs)
        if changed:
            library.unlink(missing_ok=True)  # whatever fails from here on leaves no library of older sources
        ninja = find_ninja()
        if ninja:
            _write_ninja_file(folder, units, link, library)
            _run_ninja(ninja, folder, jobs, lock)
        elif not library.exists():
            _say("no ninja found (pip install ninja), so every file is compiled anew")
            _build_directly(folder, units, link, library, jobs)
    return library


def _say(message: str) -> None:
    print(f"hyperformer_fast: {message}", file=sys.stderr, flush=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Two builds of one configuration take turns, where the file system has locks. Yields the lock's descriptor."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _note_contents(folder: Path, inputs: Iterable[Path]) -> bool:
    """Record the contents of ``inputs``; whether they changed since the last build.

    ninja compares times. A file whose content changed while its time did not move past the last build (an archive
    unpacked, a copy that keeps times) would escape it, so then all objects go.
    """
    record = folder / "contents.json"
    contents = {str(path): _digest(path.read_bytes()) for path in sorted(set(inputs))}
    try:
        last, when = json.loads(record.read_text()), record.stat().st_mtime_ns
    except (OSError, ValueError):
        last, when = None, None
    if contents == last:
        return False
    unnoticed = last is None or any(
        digest != last.get(path) and Path(path).stat().st_mtime_ns <= when for path, digest in contents.items()
    )
    if unnoticed:
        for made in folder.glob("*.o"):
            made.unlink()
    record.write_text(json.dumps(contents, indent=1))
    return True


def _object(unit: Unit) -> str:
    return re.sub(r"[^\w.]+", "_", os.path.relpath(unit.source, ROOT)).strip("_.") + ".o"


def _write_ninja_file(folder: Path, units: Sequence[Unit], link: Link, library: Path) -> None:
    def value(words: Sequence[str]) -> str:
        return shlex.join(map(str, words)).replace("$", "$$")

    def path(name: object) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        "  command = $compiler -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $before $in $after -o $out",
        "  description = link $out",
    ]
    for unit in units:
        lines += [f"build {_object(unit)}: compile {path(unit.source)}", f"  compiler = {value(unit.command)}"]
    objects = " ".join(map(_object, units))
    lines += [f"build {path(library.name)}: link {objects}"]
    lines += [f"  before = {value(link.before)}", f"  after = {value(link.after)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))


def _without_preload() -> dict[str, str]:
    # A sanitizer that is loaded into the tests is not for the compiler.
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _run_ninja(ninja: str, folder: Path, jobs: int, lock: int) -> None:
    process = subprocess.Popen(
        [ninja, "-j", str(jobs)],
        cwd=folder,
        env=_without_preload(),
        pass_fds=(lock,),  # a ninja that outlives this process still keeps others out
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = []
    for line in process.stdout:
        said.append(line.rstrip("\n"))
        print(line, end="", file=sys.stderr, flush=True)
    if process.wait():
        # "FAILED: <what>", the command, and then what the command said.
        start = next((i for i, line in enumerate(said) if line.startswith("FAILED: ")), None)
        if start is None:
            raise BuildError(f"ninja failed: {said[-1] if said else 'no message'}")
        raise _failure(said[start + 1], said[start + 2 :])


def _build_directly(folder: Path, units: Sequence[Unit], link: Link, library: Path, jobs: int) -> None:
    def run(command: Sequence[str]) -> None:
        line = shlex.join(map(str, command))
        print(line, file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                command, env=_without_preload(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise BuildError(f"{command[0]} could not be run: {error}") from error
        print(done.stdout, end="", file=sys.stderr, flush=True)
        if done.returncode:
            raise _failure(line, done.stdout.splitlines())

    objects = [str(folder / _object(unit)) for unit in units]
    with ThreadPoolExecutor(jobs) as pool:
        commands = [[*unit.command, "-c", str(unit.source), "-o", made] for unit, made in zip(units, objects)]
        list(pool.map(run, commands))
    run([*link.before, *objects, *link.after, "-o", str(library)])


def _failure(command: str, said: Sequence[str]) -> BuildError:
    words = [line for line in said if line.strip()]
    first = next((line for line in words if "error" in line.lower()), words[0] if words else "no message")
    return BuildError(f"{Path(shlex.split(command)[0]).name} failed: {first.strip()}")
