"""Hold many tasks in one model: bytes and seconds for each, and a batch of different tasks beside a batch of one.

    python benchmarks/many_tasks.py [--t5 T5-small | T5-base | embedded] [--tasks 1000] [--batch 64] [--length 32]
                                    [--new-tokens 8] [--rounds 15] [--quick] [--output DIR]

The T5 has random weights, except for the embedded one. "forward" is an evaluation forward with targets, "decoding" is
greedy generation of a fixed number of tokens. Both are timed with a batch whose samples are all of different tasks,
with one whose samples are of one task, and with that one in a model that has no other task. All weights of adapters are
kept from the forward before. Whether each sample of the mixed batch gets its own task's answer is checked before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timing import arguments, interleaved, machine, relative_error, show, write
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model
from hyperformer_fast.parameters import T5_SHAPES
from hyperformer_fast.tiny import load_tiny

#: How many tasks are removed, renamed and imported again, of the many.
_CHANGED = 20


def options_of() -> argparse.Namespace:
    parser = arguments(__doc__, quick="the embedded T5, 12 tasks, a batch of 4, one round")
    parser.add_argument("--t5", choices=("embedded", *T5_SHAPES), default="T5-small")
    number = ("tasks", 1000, "tasks of the model"), ("batch", 64, "samples"), ("length", 32, "tokens of a source")
    for name, default, words in (*number, ("new-tokens", 8, "tokens to write")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default: {default})")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(t5="embedded", tasks=12, batch=4, length=8, new_tokens=2, rounds=1)
    if options.tasks < options.batch:
        parser.error(f"--tasks must be at least --batch, got {options.tasks} and {options.batch}")
    return options


def model_of(name: str, tasks: Sequence[str]) -> HyperFormerModel:
    """A model whose adapters do something."""
    torch.manual_seed(0)
    if name == "embedded":
        t5 = load_tiny()[0]
    else:
        t5 = T5ForConditionalGeneration(T5Config(**T5_SHAPES[name], decoder_start_token_id=0)).eval()
    model = get_hyperformer_model(t5, HyperFormerConfig(tasks=list(tasks), zero_delta=False)).eval()
    return model.requires_grad_(False)


def each(call: Callable[[str], object], names: Sequence[str]) -> float:
    """Mean seconds of a call for each of some names."""
    start = time.perf_counter()
    for name in names:
        call(name)
    return (time.perf_counter() - start) / len(names)


def grown(name: str, tasks: int) -> tuple[HyperFormerModel, dict[str, float]]:
    """A model with many tasks, and what adding and changing them took."""
    names = [f"task {i}" for i in range(tasks)]
    model = model_of(name, names[:1])
    found = {"add_seconds": each(model.add_task, names[1:])}
    some = names[1 :: max(1, tasks // _CHANGED)]
    with tempfile.TemporaryDirectory() as folder:
        path = lambda task: Path(folder, task.replace(" ", "-"))  # noqa: E731
        found["export_seconds"] = each(lambda task: model.export_task(task, path(task)), some)
        found["file_bytes"] = path(some[0]).stat().st_size
        found["remove_seconds"] = each(model.remove_task, some)
        found["import_seconds"] = each(lambda task: model.import_task(path(task)), some)
    found["rename_seconds"] = each(lambda task: model.rename_task(task, f"{task} again"), some)
    for task in some:
        model.rename_task(f"{task} again", task)
    model.renumber_tasks()
    found["embedding_bytes"] = next(iter(model.task_embeddings.parameters())).nbytes
    return model, found


@torch.inference_mode()
def calls_of(model: HyperFormerModel, alone: HyperFormerModel, options: argparse.Namespace) -> dict[str, Callable]:
    """What is timed, by its name. Raises SystemExit where a mixed batch gets other answers than single tasks."""
    torch.manual_seed(1)
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (options.batch, options.length))
    labels = torch.randint(3, vocabulary, (options.batch, options.new_tokens))
    names = model.hyperformer_config.tasks
    different, one = names[: options.batch], alone.hyperformer_config.tasks[0]

    def forward(of: HyperFormerModel, task: str | list[str]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                return of(input_ids=ids, labels=labels, task=task).logits

        return call

    def decoding(of: HyperFormerModel, task: str | list[str]) -> Callable[[], Tensor]:
        lengths = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}
        return lambda: of.generate(ids, task=task, do_sample=False, **lengths)

    mixed = forward(model, different)()
    for sample in range(0, options.batch, max(1, options.batch // 8)):
        alike = forward(model, different[sample])()[sample]
        if not relative_error(mixed[sample], alike) < 1e-5:
            raise SystemExit(f"wrong: sample {sample} of the mixed batch differs from its task's own answer")
    calls = {}
    for what, made in (("forward", forward), ("decoding", decoding)):
        calls[f"{what}, different tasks"] = made(model, different)
        calls[f"{what}, one task"] = made(model, one)
        calls[f"{what}, one task alone"] = made(alone, one)
    return calls


def measure(options: argparse.Namespace) -> dict:
    model, found = grown(options.t5, options.tasks)
    alone = model_of(options.t5, ["task 0"])
    times = interleaved(calls_of(model, alone, options), options.rounds)
    footprint = model.memory_footprint()
    return {
        "t5": options.t5,
        "tasks": options.tasks,
        "batch": options.batch,
        "length": options.length,
        "new_tokens": options.new_tokens,
        **found,
        "prepared_bytes": footprint.prepared_per_task,
        "prepared_tasks": footprint.prepared_tasks,
        "seconds": times,
        "different_over_one": {
            what: times[f"{what}, different tasks"] / times[f"{what}, one task"] for what in ("forward", "decoding")
        },
        "one_of_many_over_alone": {
            what: times[f"{what}, one task"] / times[f"{what}, one task alone"] for what in ("forward", "decoding")
        },
    }


def main() -> None:
    options = options_of()
    where, found = machine(), measure(options)
    tokens = f"{found['length']} + {found['new_tokens']} tokens"
    title = f"{found['tasks']:,} tasks on {found['t5']}, B={found['batch']}, {tokens}"
    sizes = {"embedding": "a task's embedding", "file": "its file", "prepared": "its kept weights, in evaluation"}
    rows: list[tuple[str, object]] = [(f"bytes of {words}", f"{found[f'{of}_bytes']:,}") for of, words in sizes.items()]
    for what in ("add", "remove", "rename", "export", "import"):
        rows.append((f"ms to {what} one", f"{1e3 * found[f'{what}_seconds']:.2f}"))
    for what in ("forward", "decoding"):
        rows.append((f"{what}: different tasks over one task", found["different_over_one"][what]))
        rows.append((f"{what}: one of many tasks over one alone", found["one_of_many_over_alone"][what]))
    show(title, where, ("", ""), rows)
    write(f"many-tasks-{found['t5']}", where, found, options.output)


if __name__ == "__main__":
    main()
