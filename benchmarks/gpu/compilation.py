"""Triton's compilations: counted, done ahead in parallel, and carried to another machine.

Triton keeps what it compiled under a key of the kernel's source, the launch's types, constants and alignments, the
architecture, ptxas' version, some environment variables, and a hash of every file of Triton itself. A machine without a
GPU therefore makes entries that a GPU machine hits, if it has the same files of Triton: the same version for the same
version of Python. :func:`without_a_gpu` lets our ops run there with a driver that launches nothing. What they return is
then garbage, but every kernel that they would launch has been compiled as on the GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from . import children

#: Kernels that inductor generates have names that begin so.
GENERATED = "triton_"
#: The file of a group in Triton's cache. It holds the absolute paths of the group's files.
GROUP = "__grp__*.json"
#: The file beside a cache's entries that says which Triton made them.
MADE_BY = "made_by.json"
#: The most processes that compile at once.
MOST_WORKERS = 16


@contextlib.contextmanager
def without_a_gpu(arch: int) -> Iterator[None]:
    """Within the block, the backend ``triton`` takes CPU tensors and compiles for ``arch``, but launches nothing."""
    from stub_gpu import stub_gpu

    from hyperformer_fast.backends import use_backend

    with stub_gpu(arch), use_backend("triton"):
        yield


@contextlib.contextmanager
def counted() -> Iterator[dict]:
    """Count what Triton compiles within the block, what it finds in its cache, and the seconds: ours and inductor's."""
    counts = {who: {"compiled": 0, "from_cache": 0, "seconds": 0.0, "kernels": {}} for who in ("ours", "torch.compile")}
    if importlib.util.find_spec("triton") is None:
        yield counts
        return
    import triton

    def note(*, src: object, times: object, cache_hit: bool, **rest: object) -> None:
        found = counts["torch.compile" if src.name.startswith(GENERATED) else "ours"]
        found["from_cache" if cache_hit else "compiled"] += 1
        if not cache_hit:
            found["seconds"] = round(found["seconds"] + times.total / 1e6, 2)
            found["kernels"][src.name] = found["kernels"].get(src.name, 0) + 1

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        yield counts
    finally:
        triton.knobs.compilation.listener = before


@contextlib.contextmanager
def nothing_compiled() -> Iterator[dict]:
    """Within the block, which must be the first use of Triton, compilations are counted by kernel but not done."""
    import triton.compiler

    counts: dict[str, int] = {}

    def compile(src: object, **rest: object) -> object:
        counts[src.name] = counts.get(src.name, 0) + 1
        return mock.MagicMock()

    with mock.patch.object(triton.compiler, "compile", compile):
        yield counts


def entries(options: SimpleNamespace) -> Iterator[dict]:
    """Compile all that the parts with numbers and the tests need, in as many processes as there are processors. A dry
    run counts it instead."""
    if importlib.util.find_spec("triton") is None:
        yield {"line": "triton is not installed", "absent": {"triton": "not installed"}}
        return
    if options.dry_run:
        yield count(options)
        return
    yield from warm(options.arch, options.limit)


def warm(arch: int, limit: float, other: Path | None = None) -> Iterator[dict]:
    """Compile into Triton's cache in parallel; one entry for each process that has ended.

    Args:
        arch: the architecture to compile for.
        limit: seconds for each process.
        other: as in :func:`keyed_for`.
    """
    import concurrent.futures

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    relocate(folder)
    with keyed_for(other):
        mine = maker(arch)
    yield from strangers(folder, mine)
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    start = time.monotonic()

    def work(shard: int) -> tuple[int, str]:
        command = [sys.executable, "-m", "gpu.compile_only", "--arch", str(arch), "--shard", str(shard), str(workers)]
        command += ["--keyed-for", str(other)] if other else []
        return children.run_quietly(command, limit, OMP_NUM_THREADS="1")

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for code, said in pool.map(work, range(workers)):
            entry = {"line": children.last_line(said, code), "said": said}
            yield {**entry, "failed": f"exit code {code}"} if code else entry
    (folder / MADE_BY).write_text(json.dumps(mine, indent=1) + "\n")
    kept, took = sum(1 for _ in folder.glob(f"*/{GROUP}")), time.monotonic() - start
    yield {"line": f"{kept} kernels in {folder} after {took:.0f} s in {workers} processes", "workers": workers}


def count(options: SimpleNamespace) -> dict:
    """How many kernels each part compiles first, if the parts run in their order and share a cache."""
    command = [sys.executable, "-m", "gpu.compile_only", "--arch", "90", "--count"]
    code, said = children.run_quietly(command, options.limit, OMP_NUM_THREADS="1")
    if code:
        return {"line": "the compilations could not be counted", "failed": said}
    counts = json.loads(said.strip().splitlines()[-1])
    words = ", ".join(f"{part} {sum(kernels.values())}" for part, kernels in counts.items())
    total = sum(sum(kernels.values()) for kernels in counts.values())
    return {
        "line": f"{total} compilations ({words}); at {SECONDS:.1f} s each {total * SECONDS:.0f} s, "
        f"in {MOST_WORKERS} processes {total * SECONDS / MOST_WORKERS:.0f} s",
        "counts": counts,
    }


#: Seconds of a processor's time for one compilation for sm_90 (docs/performance.md#on-a-gpu).
SECONDS = 1.1


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    import triton

    return Path(triton.knobs.cache.dir)


@contextlib.contextmanager
def keyed_for(folder: Path | None) -> Iterator[None]:
    """Within the block, cache what is compiled for another build of the same Triton, whose package lies in ``folder``.

    A wheel of Triton has another libtriton for each version of Python, and its hash is part of every key. What both
    compile to is the same.
    """
    import triton
    from triton.runtime import cache

    if folder is None:
        yield
        return
    version = (folder / "triton/__init__.py").read_text()
    if triton.__version__ not in version:
        raise SystemExit(
            f"{folder} must have Triton {triton.__version__}, which is installed here, and has another one"
        )
    with mock.patch.object(cache, "__file__", str(folder / "triton/runtime/cache.py")):
        key = cache.triton_key.__wrapped__()
    with mock.patch.object(cache, "triton_key", lambda: key):
        yield


def maker(arch: int) -> dict[str, str]:
    """What every key of Triton's cache has in common on this machine."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime import cache

    return {
        "version": triton.__version__,
        "files": hashlib.sha256(cache.triton_key().encode()).hexdigest(),
        "backend": make_backend(GPUTarget("cuda", arch, 32)).hash(),
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
    }


def strangers(folder: Path, mine: dict[str, str]) -> Iterator[dict]:
    """One entry if the cache was carried from a machine whose keys are other ones: nothing in it will be found."""
    if not (folder / MADE_BY).exists():
        return
    theirs = json.loads((folder / MADE_BY).read_text())
    other = [f"{name} {theirs.get(name)!r}, here {mine[name]!r}" for name in mine if theirs.get(name) != mine[name]]
    if other:
        yield {"line": "the carried cache is of no use here", "absent": {"warm cache": f"made with {'; '.join(other)}"}}


def relocate(folder: Path) -> int:
    """Let a cache that was made in another folder be read in this one; returns how many of its kernels were moved.

    A group's file holds absolute paths, and Triton takes a kernel whose files are not there for one that was never
    compiled.
    """
    moved = 0
    for path in folder.glob(f"*/{GROUP}"):
        files = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent / name) for name in files}
        if here != files:
            path.write_text(json.dumps({"child_paths": here}))
            moved += 1
    return moved
