"""Time decoding with adapters beside the bare T5, PEFT's LoRA and the `adapters` library, each sample of another task.

    python benchmarks/decode.py [--batches 1 8 64 64:8] [--seconds 40] [--rounds 5] [--output DIR]

A T5-small with random weights in float32 writes 32 tokens greedily from sources of 32 tokens. Every sample of a batch
has a task of its own, so that a batch of 64 has 64 tasks; in one of "64:8" the first eight samples have the first of
eight tasks, and so on. All rows of a group take turns in one process, and a row's ratio is the median over the rounds
of its time over the bare T5's in the same round, with the quartiles in brackets. A call is the whole `generate`, with
its encoder and preparation, and a millisecond per token is its time over the tokens of a sample. The second ratio of
our rows is over the bare T5 with the same pieces fused: what adapters cost.

Before a row is timed, the logits of each step of its `generate` are compared with a forward of single samples with one
task, without a cache and with nothing fused. Then it is counted how often weights were generated and folded in the
first forward of our model and in later ones. Our rows and the bare ones take turns by themselves, because the rows of
others and the loops take many times as long; those are timed beside the bare T5 afterwards.

A library that is absent is named and left out. `adapters` 1.3 needs transformers 4.57, which the file's name then says.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any
from unittest import mock

import torch
from decode_models import BARE, SAME_FUSE, Batch, Row, bare_rows, own_models, own_rows, peer_rows, versions
from plots import draw
from step_cases import UNFUSED
from step_measure import ratios
from step_models import frozen_t5
from timing import arguments, machine, relative_error, show, turns, write

from hyperformer_fast.backends import serving

SIZE, LAYERS, SOURCE, TOKENS, VOCABULARY = "T5-small", 6, 32, 32, 32128
#: The largest relative error of logits, by rounding: other shapes of products, and a cache.
OFF = 1e-4
#: Adapters that change logits by less, in float32, might as well be absent.
LEAST_EFFECT = 1e-3
#: Samples of a batch that are compared one by one.
COMPARED = 8
#: The ops that make an adapter's weights.
MAKING = ("generate_weights", "fold")


class Wrong(RuntimeError):
    """A row does not compute what it should."""


def sources(samples: int, length: int) -> Batch:
    ids = torch.randint(2, 1000, (samples, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(tokens: int) -> dict[str, Any]:
    """Settings of ``generate``: so many tokens for each sample, no more and no fewer."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}


@torch.no_grad()
def check(name: str, row: Row, bare: Row, batch: Batch, tasks: Sequence[str], tokens: int) -> float:
    """Compare the logits of each step with those of samples by themselves; returns the largest relative error.

    Raises:
        Wrong: it is too large, the number of tokens is not the one that was asked for, or the adapters do nothing.
    """
    found = row(batch, tasks, {**greedy(tokens), "output_logits": True, "return_dict_in_generate": True})
    written = torch.cat([each.sequences for each in found])
    logits = torch.cat([torch.stack(each.logits, 1) for each in found])
    if list(written.shape) != [len(tasks), 1 + tokens]:
        raise Wrong(f"{name}: {list(written.shape)} tokens, expected {[len(tasks), 1 + tokens]}")
    worst = 0.0
    for i in range(0, len(tasks), max(1, len(tasks) // COMPARED)):
        sample = {key: each[i : i + 1] for key, each in batch.items()}
        given = sample, tasks[i], written[i : i + 1, :-1]
        error = relative_error(logits[i : i + 1], row.alone(*given))
        if not error <= OFF:
            raise Wrong(f"{name}: the logits of sample {i} are off by {error:.1e}")
        if row.alone is not bare.alone and relative_error(logits[i : i + 1], bare.alone(*given)) < LEAST_EFFECT:
            raise Wrong(f"{name}: sample {i} has the bare T5's logits")
        worst = max(worst, error)
    return worst


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often each op that makes adapters' weights was called within a ``with`` block."""
    counts = dict.fromkeys(MAKING, 0)
    with contextlib.ExitStack() as stack:
        for op in MAKING:
            backend = serving(op, "cpu", torch.float32)
            real = getattr(backend, op)

            def counting(*args: Any, op: str = op, real: Any = real) -> Any:
                counts[op] += 1
                return real(*args)

            stack.enter_context(mock.patch.object(backend, op, counting))
        yield counts


def count_generations(model: Any, batch: Batch, tasks: list[str], tokens: int) -> dict[str, dict[str, int]]:
    """The ops that made weights in the first forward of all tasks, and in forwards and generations after it."""
    ids = batch["input_ids"][:, :1]
    model.train().eval()  # lets go of weights that are kept
    with torch.no_grad():
        with counted() as first:
            model(**batch, decoder_input_ids=ids, task=tasks)
        with counted() as later:
            model(**batch, decoder_input_ids=ids, task=tasks)
            model(**batch, decoder_input_ids=ids, task=tasks[::-1])
            model.generate(**batch, task=tasks, **greedy(tokens))
            model(**batch, decoder_input_ids=ids, task=tasks[0])
    return {"first": dict(first), "later": dict(later)}


def timed(
    rows: dict[str, Row], batch: Batch, tasks: list[str], tokens: int, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """The milliseconds per token of each row, and its ratios."""
    settings = greedy(tokens)
    calls = {name: lambda row=row: row(batch, tasks, settings) for name, row in rows.items()}
    times = turns(calls, rounds, until=time.perf_counter() + seconds)
    found = {}
    for name, mine in times.items():
        found[name] = {
            "milliseconds per token": 1e3 * median(mine) / tokens, "rounds": len(mine), **ratios(mine, times[BARE])
        }  # fmt: skip
        same = SAME_FUSE.get(name)
        if same in times:
            found[name]["over the same fused"] = ratios(mine, times[same])
    return found


def measure(
    layers: int, vocabulary: int, batches: list[tuple[int, int]], length: int, tokens: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Check and time all rows at each batch size."""
    t5 = frozen_t5(SIZE, layers, vocabulary, 0.0, True, "cpu", torch.float32).eval()
    tasks = [f"task{i}" for i in range(max(number for _, number in batches))]
    models = own_models(t5, tasks)
    ours, (peers, absent) = own_rows(models), peer_rows(t5, tasks)
    bare = bare_rows(t5)
    generations = count_generations(models[UNFUSED], sources(len(tasks), length), tasks, tokens)
    every = {**bare, **ours, **peers}
    close = {name: row for name, row in every.items() if name in bare or name in SAME_FUSE}
    found = {}
    for samples, number in batches:
        batch, chosen = sources(samples, length), [tasks[i * number // samples] for i in range(samples)]
        errors = {name: check(name, row, bare[BARE], batch, chosen, tokens) for name, row in every.items()}
        figures = timed(close, batch, chosen, tokens, rounds, seconds)
        # with one task a loop is one call
        others = {name: row for name, row in every.items() if name not in close and not (row.loops and number == 1)}
        if others:
            beside = timed({BARE: bare[BARE], **others}, batch, chosen, tokens, rounds, seconds)
            figures |= {name: each for name, each in beside.items() if name != BARE}
        for name, each in figures.items():
            each["error"] = errors[name]
        found[f"B={samples}, {number} {'task' if number == 1 else 'tasks'}"] = figures
    return {
        "shape": f"{SIZE}, {layers}+{layers} layers, float32, {len(tasks)} tasks",
        "source": length, "tokens": tokens, "packages": versions(), "generations": generations,
        "batches": found, "absent": absent,
    }  # fmt: skip


def with_quartiles(found: dict[str, Any] | None) -> str:
    """A ratio as the table has it."""
    if found is None:
        return ""
    low, high = found["quartiles"]
    return f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def report(found: dict[str, Any], where: dict[str, str]) -> None:
    """Print the table of each batch size, and what was counted."""
    columns = ("", "ms per token", "over bare", "over bare, the same fused", "rounds")
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    for batch, rows in found["batches"].items():
        lines = [
            (
                name, f"{row['milliseconds per token']:.2f}", with_quartiles(row),
                with_quartiles(row.get("over the same fused")), row["rounds"],
            )
            for name, row in rows.items()
        ]  # fmt: skip
        title = f"{found['shape']}; {batch}; {found['tokens']} tokens written; {packages}"
        show(title, where, columns, lines)
    for forward, counts in found["generations"].items():
        print(f"{forward} forward: " + ", ".join(f"{op} called {n} times" for op, n in counts.items()))
    for package, why in found["absent"].items():
        print(f"not measured: {package}: {why}")


def sizes_of(text: str) -> tuple[int, int]:
    """Samples and tasks of a batch: "64:8", or "64" for as many tasks as samples."""
    samples, _, tasks = text.partition(":")
    found = int(samples), int(tasks or samples)
    if not 1 <= found[1] <= found[0]:
        raise argparse.ArgumentTypeError(f"a batch needs at least one task, and no more than samples, got {text!r}")
    return found


def main() -> None:
    parser = arguments(__doc__ or "", rounds=5, quick="one block, one batch and three tokens, to try the script")
    parser.add_argument(
        "--batches", type=sizes_of, nargs="+", default=[(1, 1), (8, 8), (64, 64), (64, 8)], metavar="B[:TASKS]",
        help="samples, and tasks if there are fewer (default: 1 8 64 64:8)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=40, help="for each of the two groups of a batch, at least (default: 40)"
    )
    options = parser.parse_args()
    sizes = {"layers": LAYERS, "vocabulary": VOCABULARY, "length": SOURCE, "tokens": TOKENS}
    if options.quick:
        sizes = {"layers": 1, "vocabulary": 1000, "length": 8, "tokens": 3}
        options.batches, options.rounds, options.seconds = [(1, 1), (4, 2)], 1, 0.0
    where = machine()
    found = measure(**sizes, batches=options.batches, rounds=options.rounds, seconds=options.seconds)
    report(found, where)
    major = found["packages"]["transformers"].partition(".")[0]
    draw(write(f"decode-transformers{major}", where, found, options.output))


if __name__ == "__main__":
    main()
