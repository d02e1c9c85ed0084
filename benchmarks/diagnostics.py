"""Time what diagnostics, clipping of each task and PCGrad add to a training step.

    python benchmarks/diagnostics.py [--sizes demo T5-small T5-base] [--layers N] [--rounds 31] [--quick] [--output DIR]

A step is forward, backward and AdamW on a batch with all tasks mixed: of the demo (the embedded T5 on the built-in
tasks), or of a T5 of the paper with random weights, 8 tasks and 8 samples of 128 tokens. All rows take turns; a time is
the median over the rounds. The Trainer watches the gradients in the last 8 steps of each 100 and then makes the figures
once; "per step of 100" is what that adds to a step on average.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from demo import demo_trainer
from step_models import Step
from timing import arguments, interleaved, machine, show, write

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.parameters import T5_SHAPES
from hyperformer_fast.task_gradients import TaskGradients
from hyperformer_fast.task_similarity import task_similarity
from hyperformer_fast.training import HyperFormerTrainer
from hyperformer_fast.training.arguments import HyperFormerTrainingArguments
from hyperformer_fast.training.diagnostics import WATCHED_STEPS

DEMO, PLAIN, FIGURES = "demo", "step", "figures alone"
INTERVAL = HyperFormerTrainingArguments.diagnostics_steps


def demo() -> tuple[HyperFormerModel, Callable[[], object]]:
    """The demo's model and its step on one mixed batch."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer(HyperFormerTrainer, folder)
        batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.adapted
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    model.train()

    def call() -> object:
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss

    return model, call


def rows_of(model: HyperFormerModel, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The step as it is, watched and changed; and the figures, which are made once in an interval."""

    def watched(**changes: object) -> Callable[[], object]:
        watch = TaskGradients(model, **changes)

        def attached() -> object:
            with watch.attached():
                return call()

        return attached

    read = TaskGradients(model)

    def figures() -> object:
        statistics = read.statistics
        return task_similarity(model).figures(), statistics.figures(model.hyperformer_config.tasks, meet=True)

    with read.attached():
        call()
    return {
        PLAIN: call,
        "watched": watched(),
        "clipped by task": watched(max_norm=0.1),
        "PCGrad": watched(surgery="pcgrad"),
        "all three": watched(max_norm=0.1, surgery="pcgrad"),
        FIGURES: figures,
    }


def main() -> None:
    parser = arguments(__doc__, rounds=31, quick="one round, one layer")
    parser.add_argument("--sizes", nargs="*", default=[DEMO, "T5-small", "T5-base"])
    parser.add_argument("--layers", type=int, help="blocks of each stack of the paper's T5s; default: the size's")
    options = parser.parse_args()
    where, results = machine(), {}
    for size in options.sizes:
        if size == DEMO:
            model, call = demo()
        else:
            layers = 1 if options.quick else options.layers or T5_SHAPES[size]["num_layers"]
            timed = Step(size, layers, 8, 8 if options.quick else 128, "cpu", fuse="auto")
            model, call = timed.model, timed
        times = interleaved(rows_of(model, call), 1 if options.quick else options.rounds)
        added = {name: seconds - times[PLAIN] for name, seconds in times.items() if name not in (PLAIN, FIGURES)}
        once = times[FIGURES]
        per_step = (WATCHED_STEPS * added["watched"] + once) / INTERVAL
        last = added["watched"] + once
        results[size] = {
            "seconds": times,
            "per_step_of_interval": per_step / times[PLAIN],
            "diagnosed_step": last / times[PLAIN],
        }
        rows = [(name, f"{1e3 * t:.2f} ms", f"{100 * t / times[PLAIN]:.2f} %") for name, t in times.items()]
        rows += [("the step that is logged adds", f"{1e3 * last:.2f} ms", f"{100 * last / times[PLAIN]:.2f} %")]
        rows += [(f"per step of {INTERVAL}", f"{1e3 * per_step:.3f} ms", f"{100 * per_step / times[PLAIN]:.2f} %")]
        show(f"{size}: diagnostics", where, ("", "time", "of a step"), rows)
    write("diagnostics", where, results, options.output)


if __name__ == "__main__":
    main()
