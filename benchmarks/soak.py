"""Ask one model from many threads for a long time, while tasks come and go, and check every answer.

    python benchmarks/soak.py --minutes 30 --threads 8 --json benchmarks/results/soak.json

Each thread asks for a forward or a generation (greedy, beams, a static cache) of some rows, each of a task drawn for
it. The answers of each row with each task were stored before, each from a call by itself. Another thread adds tasks, a
copy of an older one each, asks for them, and removes them again. The memory of the process is watched: it must stop
growing once everything was used.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
ROWS_OF_EACH = 4
MOST_ROWS = 6
#: Products of the frozen T5 may round otherwise in another batch.
TOLERANCE = 1e-3


class Soak:
    """One model, the answers that it must give, and what was found.

    Args:
        threads: how many ask.
        seed: of everything that is drawn.
    """

    def __init__(self, threads: int, seed: int):
        t5, self.tokenizer = load_tiny()
        self.tasks, self.threads, self.seed = list(BUILTIN_TASKS), threads, seed
        torch.manual_seed(seed)
        self.model = get_hyperformer_model(t5, HyperFormerConfig(tasks=self.tasks, reduction_factor=4)).eval()
        with torch.no_grad():  # adapters that matter
            for parameter in (*self.model.task_embeddings.parameters(), *self.model.hypernetworks.parameters()):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        self.sources = [
            builtin_spec(task).source_text(row, "row")
            for task in self.tasks
            for row in load_builtin(task, "test")[:ROWS_OF_EACH]
        ]
        self.expected = {(task, i): self._alone(task, i) for task in self.tasks for i in range(len(self.sources))}
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self._lock, self._stop = threading.Lock(), threading.Event()

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
            self._ask(draw)

    def _change(self) -> None:
        """Add a copy of a task, ask for it among others, remove it."""
        draw, number = random.Random(f"{self.seed} changes"), 0
        while not self._stop.is_set():
            old, number = draw.choice(self.tasks), number + 1
            new = f"copy {number}"
            self.model.add_task(new, init_from=old)
            self.counts["tasks added"] += 1
            for _ in range(4):
                self._ask(draw, lambda task: new if task == old else task)
            self.model.remove_task(new)
            self.counts["tasks removed"] += 1

    def run(self, seconds: float) -> dict[str, Any]:
        """Ask for so long, and return what was found."""
        acts = [*(lambda i=i: self._serve(i) for i in range(self.threads)), self._change]
        failed: list[str] = []

        def guarded(act: Callable[[], None]) -> None:
            try:
                act()
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
                self._stop.set()

        threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
        began, process = time.monotonic(), psutil.Process()
        for thread in threads:
            thread.start()
        step = max(0.5, seconds / 60)
        while time.monotonic() < began + seconds and not self._stop.wait(step):
            self.memory.append((round(time.monotonic() - began, 1), round(process.memory_info().rss / 2**20, 1)))
        self._stop.set()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        sizes = [megabytes for _, megabytes in self.memory]
        # The first third may grow: caches fill, and threads get memory pools of their own.
        settled = sizes[len(sizes) // 3 :] or sizes
        parts = settled[: len(settled) // 2] or settled, settled[len(settled) // 2 :]
        grown = sum(parts[1]) / len(parts[1]) - sum(parts[0]) / len(parts[0])
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
            "rss_mb": {"first": sizes[0], "last": sizes[-1], "most": max(sizes), "grown_when_settled": round(grown, 1)},
            "rss_mb_over_time": self.memory,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if an answer was wrong or a thread failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--threads", type=int, default=8, help="how many threads ask (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was found")
    options = parser.parse_args(arguments)
    found = Soak(options.threads, options.seed).run(60 * options.minutes)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    counts, memory = found["counts"], found["rss_mb"]
    print(f"{found['answers']} answers in {found['seconds']} s from {found['threads']} threads: {found['wrong']} wrong")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    print(f"memory: {memory['first']} MB at first, {memory['last']} MB at last, {memory['most']} MB at most")
    print(f"memory grew by {memory['grown_when_settled']} MB when it had settled")
    for line in (*found["first_wrong"], *found["errors"]):
        print(line, file=sys.stderr)
    return int(bool(found["wrong"] or found["errors"]))


if __name__ == "__main__":
    raise SystemExit(main())
