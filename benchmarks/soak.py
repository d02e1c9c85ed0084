"""Ask one model from many threads for a long time, while tasks come and go, and check every answer.

    python benchmarks/soak.py --minutes 30 --threads 8 --json benchmarks/results/soak.json

Each thread asks for a forward or a generation (greedy, beams, a static cache) of some rows, each of a task drawn for
it. The answers of each row with each task were stored before, each from a call by itself. Another thread adds tasks, a
copy of an older one each, asks for them, and removes them again.

Memory is looked at some sixty times, while all threads rest between two requests: how many Python objects and tensors
there are, how many bytes the tensors have, and how many the allocator has handed out in all. None of these may grow
once everything was used. The process's resident memory is shown as well, as it was under way and once the allocator
gave back what it keeps for later: each thread has a pool of its own, whose pages come and go.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.data.builtin import BUILTIN_TASKS, load_builtin
from hyperformer_fast.data.registry import builtin_spec
from hyperformer_fast.tiny import load_tiny

#: How a generation may be made.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 5},
    "beams": {"max_new_tokens": 5, "num_beams": 3},
    "static cache": {"max_new_tokens": 5, "cache_implementation": "static"},
}
MOST_ROWS = 6
#: Products of the frozen T5 may round otherwise in another batch.
TOLERANCE = 1e-3
LOOKS = 60


class _Allocated(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's memory and its bytes; (0, 0) for one without memory, as a trace has them."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return 0, 0


class Memory(NamedTuple):
    """The memory of this process at one moment."""

    objects: int  #: that Python's collector knows
    tensors: int
    tensors_mb: float
    allocated_mb: float | None  #: that malloc handed out and did not get back; None without glibc
    trimmed_mb: float  #: resident, after malloc gave back what it can

    @classmethod
    def now(cls) -> Memory:
        """Look at it, after a search for cycles."""
        gc.collect()
        found = gc.get_objects()
        tensors = [each for each in found if issubclass(type(each), torch.Tensor)]
        storages = dict(map(_storage, tensors))
        counts = len(found), len(tensors), sum(storages.values()) / _MB
        del found, tensors
        allocated, libc = None, ctypes.CDLL(None)
        if hasattr(libc, "mallinfo2"):
            libc.mallinfo2.restype = _Allocated
            libc.malloc_trim(0)
            all_pools = libc.mallinfo2()
            allocated = (all_pools.uordblks + all_pools.hblkhd) / _MB
        return cls(*counts, allocated, resident_mb())


_MB = 2**20


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / _MB


class Rests:
    """Moments at which all threads of some wait between two requests."""

    def __init__(self, threads: int):
        self._asked, self._barrier = threading.Event(), threading.Barrier(threads + 1)

    def pause(self) -> None:
        """Called by each thread between two requests."""
        if self._asked.is_set():
            self._barrier.wait()
            self._barrier.wait()

    @contextlib.contextmanager
    def all_at_rest(self) -> Iterator[None]:
        """Surrounds what is done while all threads wait."""
        self._asked.set()
        self._barrier.wait()
        self._asked.clear()
        try:
            yield
        finally:
            self._barrier.wait()

    def abort(self) -> None:
        """Let nobody wait any more: whoever does gets BrokenBarrierError."""
        self._barrier.abort()


class Soak:
    """One model, the answers that it must give, and what was found.

    Args:
        threads: how many ask.
        seed: of everything that is drawn.
        tasks: of the built-in ones.
        rows_of_each: rows of each task to ask for.
    """

    def __init__(self, threads: int, seed: int, tasks: Sequence[str] = BUILTIN_TASKS, rows_of_each: int = 4):
        t5, self.tokenizer = load_tiny()
        self.tasks, self.threads, self.seed = list(tasks), threads, seed
        torch.manual_seed(seed)
        self.model = get_hyperformer_model(t5, HyperFormerConfig(tasks=self.tasks, reduction_factor=4)).eval()
        with torch.no_grad():  # adapters that matter
            for parameter in (*self.model.task_embeddings.parameters(), *self.model.hypernetworks.parameters()):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        self.sources = [
            builtin_spec(task).source_text(row, "row")
            for task in self.tasks
            for row in load_builtin(task, "test")[:rows_of_each]
        ]
        self.expected = {(task, i): self._alone(task, i) for task in self.tasks for i in range(len(self.sources))}
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.resident: list[tuple[float, float]] = []
        self.memory: list[tuple[float, Memory]] = []
        self._lock, self._stop, self._rests = threading.Lock(), threading.Event(), Rests(threads + 1)

    def _inputs(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer([self.sources[i] for i in rows], padding=True, return_tensors="pt")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _logits(self, tasks: Any, rows: Sequence[int]) -> torch.Tensor:
        start = torch.zeros(len(rows), 1, dtype=torch.long)
        with torch.inference_mode():
            return self.model(**self._inputs(rows), decoder_input_ids=start, task=tasks).logits[:, 0].clone()

    def _texts(self, tasks: Any, rows: Sequence[int], kind: str) -> list[str]:
        out = self.model.generate(**self._inputs(rows), task=tasks, **KINDS[kind])
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def _alone(self, task: str, row: int) -> dict[str, Any]:
        return {"forward": self._logits(task, [row])[0], **{k: self._texts(task, [row], k)[0] for k in KINDS}}

    def _ask(self, draw: random.Random, of: Callable[[str], str] = lambda task: task) -> None:
        """Ask once, and compare. ``of`` is the task whose answers those of another are."""
        rows = [draw.randrange(len(self.sources)) for _ in range(draw.randint(1, MOST_ROWS))]
        tasks = [draw.choice(self.tasks) for _ in rows]
        kind = draw.choice(["forward", *KINDS])
        named = [of(task) for task in tasks]
        got: Any = self._logits(named, rows) if kind == "forward" else self._texts(named, rows, kind)
        for answer, task, row in zip(got, tasks, rows, strict=True):
            expected = self.expected[task, row][kind]
            same = torch.allclose(answer, expected, atol=TOLERANCE) if kind == "forward" else answer == expected
            with self._lock:
                self.counts[kind] += 1
                if not same:
                    self.wrong.append(f"{kind} of {task}, row {row}: {answer} in place of {expected}"[:300])

    def _serve(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        while not self._stop.is_set():
            self._rests.pause()
            self._ask(draw)

    def _change(self) -> None:
        """Add a copy of a task, ask for it among others, remove it."""
        draw, number = random.Random(f"{self.seed} changes"), 0
        while not self._stop.is_set():
            self._rests.pause()
            old, number = draw.choice(self.tasks), number + 1
            new = f"copy {number}"
            self.model.add_task(new, init_from=old)
            self.counts["tasks added"] += 1
            for _ in range(4):
                self._ask(draw, lambda task: new if task == old else task)
            self.model.remove_task(new)
            self.counts["tasks removed"] += 1

    def _look(self, began: float) -> None:
        self.resident.append((round(time.monotonic() - began, 1), round(resident_mb(), 1)))
        with self._rests.all_at_rest():
            self._logits(self.tasks, range(len(self.tasks)))  # so that what is kept is of these tasks
            self.memory.append((round(time.monotonic() - began, 1), Memory.now()))

    def run(self, seconds: float) -> dict[str, Any]:
        """Ask for so long, and return what was found."""
        acts = [*(lambda i=i: self._serve(i) for i in range(self.threads)), self._change]
        failed: list[str] = []

        def guarded(act: Callable[[], None]) -> None:
            try:
                act()
            except threading.BrokenBarrierError:
                pass  # another thread failed
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
                self._stop.set()
                self._rests.abort()

        threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            with contextlib.suppress(threading.BrokenBarrierError):
                while time.monotonic() < began + seconds and not self._stop.wait(max(seconds / LOOKS, 0.5)):
                    self._look(began)
        except BaseException:
            self._rests.abort()  # those that wait for this look would wait for good
            raise
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        took = time.monotonic() - began
        answers = sum(self.counts[kind] for kind in ("forward", *KINDS))
        return {
            "seconds": round(took, 1),
            "threads": self.threads,
            "answers": answers,
            "answers_per_second": round(answers / took, 1),
            "counts": dict(self.counts),
            "wrong": len(self.wrong),
            "first_wrong": self.wrong[:5],
            "errors": failed,
            "grown_when_settled": grown([look for _, look in self.memory]),
            "resident_mb": {"first": self.resident[0][1], "most": max(mb for _, mb in self.resident)},
            "at_rest": [{"seconds": when, **look._asdict()} for when, look in self.memory],
            "resident_mb_over_time": self.resident,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
        }


def grown(looks: Sequence[Memory]) -> dict[str, float | None]:
    """How much more there was in the last third of the looks than in the third before, on average. The first third may
    grow: caches fill, and threads get memory pools of their own."""
    third = max(len(looks) // 3, 1)
    before, after = looks[-2 * third : -third] or looks[:1], looks[-third:]

    def mean(some: Sequence[Memory], field: str) -> float:
        return sum(getattr(look, field) for look in some) / len(some)

    return {
        field: None
        if looks[0].allocated_mb is None and field == "allocated_mb"
        else round(mean(after, field) - mean(before, field), 2)
        for field in Memory._fields
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if an answer was wrong or a thread failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--threads", type=int, default=8, help="how many threads ask (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--quick", action="store_true", help="two seconds with three rows, to try the script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was found")
    options = parser.parse_args(arguments)
    small: dict[str, Any] = {"tasks": BUILTIN_TASKS[:3], "rows_of_each": 1} if options.quick else {}
    found = Soak(options.threads, options.seed, **small).run(2 if options.quick else 60 * options.minutes)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    counts, most = found["counts"], found["resident_mb"]["most"]
    print(f"{found['answers']} answers in {found['seconds']} s from {found['threads']} threads: {found['wrong']} wrong")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    for name, more in found["grown_when_settled"].items():
        if more is None:
            continue
        print(f"{name}: {found['at_rest'][-1][name]:,.0f} at last, {more:+,.1f} from the second third to the last one")
    print(f"resident memory while requests run: {most:,.0f} MB at most")
    for line in (*found["first_wrong"], *found["errors"]):
        print(line, file=sys.stderr)
    return int(bool(found["wrong"] or found["errors"]))


if __name__ == "__main__":
    raise SystemExit(main())
