"""Run one part in a process and a session of its own, and read what it measures as it comes.

A child writes one JSON object per line to a pipe. When it has ended, or its time is up, everything in its session is
killed, so that nothing lives on and disturbs what is timed next. If this process dies itself, even by SIGKILL, the
child notices that its standard input closes, and kills its session (``die_with_the_parent``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The environment variable that names the pipe's file descriptor to a child.
PIPE = "HFF_REPORT_PIPE"
#: Seconds between two looks at whether the child still lives, while it writes nothing.
TICK = 0.1
#: Seconds to wait for a process that was killed.
REAPED = 20
#: How much of a child's output is kept of the end.
LAST_OUTPUT = 4000


@dataclasses.dataclass
class Outcome:
    """How a child ended: ``done``, ``failed`` (an exit code), ``crashed`` (a signal) or ``timed out``."""

    status: str
    seconds: float
    detail: str  #: the exit code or the signal in words; empty for ``done``
    said: str  #: the end of what it printed


def environment() -> dict[str, str]:
    """The environment of a child: our folders go before the caller's PYTHONPATH, which may have carried packages."""
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Inductor would otherwise start a pool of processes that outlive a compilation and disturb what is timed.
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(
    command: list[str],
    limit: float,
    on_entry: Callable[[dict], object],
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run ``command`` until it ends, or for ``limit`` seconds, and call ``on_entry`` with each object that it writes.

    Args:
        command: the program and its arguments.
        limit: seconds after which everything that it started is killed.
        on_entry: called as soon as an object has been read.
        clock: says how many seconds have passed.
    """
    start = clock()
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reader, "rb", buffering=0) as results:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=ROOT / "benchmarks",
            env={**environment(), PIPE: str(writer)}, pass_fds=(writer,), start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        try:
            late = not _read(results, child, lambda: clock() - start >= limit, on_entry)
        finally:
            kill_session(child)
        output.seek(0)
        said = output.read().decode(errors="replace")[-LAST_OUTPUT:]
    seconds = round(clock() - start, 1)
    if late:
        return Outcome("timed out", seconds, f"killed after {limit:.0f} s", said)
    code = child.returncode
    if code < 0:
        return Outcome("crashed", seconds, f"killed by {signal.Signals(-code).name}", said)
    return Outcome("failed", seconds, f"exit code {code}", said) if code else Outcome("done", seconds, "", said)


def _read(results, child: subprocess.Popen, late: Callable[[], bool], on_entry: Callable[[dict], object]) -> bool:
    """Read objects until the child has ended. Returns False if it became too late for that."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(results, selectors.EVENT_READ)
        while not late():
            ended = has_ended(child)  # asked before the pipe is read: what was written before is read below
            while selector.select(0 if ended else TICK):
                block = results.read(1 << 16)
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    on_entry(json.loads(line))
                if not block:  # the child has closed the pipe, as it does when it ends
                    selector.unregister(results)
                    break
                if late():
                    return False
            if ended:
                return True
    return False


def has_ended(child: subprocess.Popen) -> bool:
    """Whether the child has ended. It is not reaped, so that its id stays its own until its session is killed."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_session(child: subprocess.Popen) -> None:
    """Kill what is left of the child's session, and reap the child. A child that has ended keeps its exit code."""
    os.killpg(child.pid, signal.SIGKILL)
    child.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs can keep a killed process
        child.wait(REAPED)


@contextlib.contextmanager
def killed_is_exit() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise SystemExit, so that a child's session is killed on the way out."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_the_parent() -> None:
    """In a child: kill this session as soon as standard input closes, which the parent alone holds open."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def writer() -> Callable[[dict], None]:
    """In a child: a function that hands an object to the parent; without a parent it prints the object."""
    if PIPE not in os.environ:
        return lambda entry: print(json.dumps(entry), flush=True)
    handle = int(os.environ.pop(PIPE))
    os.set_inheritable(handle, False)  # what this child starts must not hold the pipe open
    pipe = os.fdopen(handle, "w", buffering=1)

    def write(entry: dict) -> None:
        pipe.write(json.dumps(entry) + "\n")
        pipe.flush()

    return write


def last_line(said: str, code: int) -> str:
    """The last line that a program printed, or its exit code if it printed nothing."""
    return said.strip().splitlines()[-1] if said.strip() else f"exit code {code}"


def run_quietly(
    command: list[str], limit: float, folder: Path = ROOT / "benchmarks", **variables: str
) -> tuple[int, str]:
    """In a child: run a program in the same session for ``limit`` seconds at most. Returns its exit code (-1: it took
    too long), and the end of what it printed."""
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
                env={**os.environ, **variables}, timeout=limit,
            )  # fmt: skip
            code, more = done.returncode, ""
        except subprocess.TimeoutExpired:
            code, more = -1, f"\ntook more than {limit:.0f} s"
        output.seek(0)
        return code, output.read().decode(errors="replace")[-LAST_OUTPUT:] + more
