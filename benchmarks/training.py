"""The demo trained with the reference and with the kernels, and what a step costs beside the bare T5:
`python benchmarks/training.py`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from pathlib import Path

import torch
from rich.progress import track
from timing import RESULTS, described, interleaved, machine, show, write
from transformers import PrinterCallback, T5Config, T5ForConditionalGeneration, TrainerCallback, set_seed

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.backends import use_backend
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.data import load_tasks
from hyperformer_fast.parameters import T5_SHAPES
from hyperformer_fast.training.arguments import RunConfig
from hyperformer_fast.training.base import load_base
from hyperformer_fast.training.evaluate import limited
from hyperformer_fast.training.trainer import HyperFormerTrainer

BACKENDS = ("reference", "cpu")
CONTROL = "reference, weights one ulp off"


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


class Recording(HyperFormerTrainer):
    """Keeps each step's loss as it is (the Trainer's log has four decimals), and the reference's with the very weights
    and batch of that step."""

    losses: list[float]
    beside: list[float]

    def training_step(self, model, inputs, *args, **kwargs):
        # the embedded T5 has no dropout: nothing is drawn here
        with torch.no_grad(), use_backend("reference"):
            self.beside.append(model(**self._prepare_inputs(dict(inputs))).loss.item())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss


@contextlib.contextmanager
def one_ulp_off():
    """The reference with generated weights 2^-23 too large: how far training itself carries a rounding error."""
    original = ReferenceBackend.generate_weights
    ReferenceBackend.generate_weights = lambda *args: original(*args) * (1 + 2**-23)
    try:
        yield
    finally:
        ReferenceBackend.generate_weights = original


def losses(
    backend: str, steps: int, output: str, learning_rate: float | None = None
) -> tuple[list[float], list[float]]:
    """Of the demo's run in float32, one per step, for its first steps: the schedule is that of the whole run. Then the
    reference's losses at the same weights."""
    run = RunConfig(output_dir=output, eval_steps=0, save_steps=0)
    if learning_rate is not None:
        run = dataclasses.replace(run, learning_rate=learning_rate)
    run = run.located()
    data = limited(load_tasks(run.data_dir, run.tasks), run)
    set_seed(run.seed)
    t5, tokenizer = load_base(run.model)
    model = get_hyperformer_model(t5, run.hyperformer_config(list(data)))
    trainer = Recording(model, run, data, tokenizer)
    trainer.losses, trainer.beside = [], []
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StopAfter(steps))
    with use_backend(backend):
        trainer.train()
    return trainer.losses, trainer.beside


def step_ratios(layers: int, B: int, L: int, rounds: int) -> dict[str, float]:
    """Seconds of a step (forward, backward, AdamW) over those of the bare T5, whose own layer norms are then trained.

    A T5-base but for its number of layers, random weights, HyperFormer++ with a reduction factor of 32 and 8 tasks.
    """
    shape = {**T5_SHAPES["T5-base"], "num_layers": layers}
    calls = {}
    ids = torch.randint(1, 1000, (B, L), generator=torch.Generator().manual_seed(0))
    labels = ids[:, : L // 4].contiguous()
    for name in ("bare", *BACKENDS):
        torch.manual_seed(0)
        t5 = T5ForConditionalGeneration(T5Config(vocab_size=1000, dropout_rate=0.0, decoder_start_token_id=0, **shape))
        extra = {}
        if name == "bare":
            model = t5
            for key, parameter in t5.named_parameters():
                parameter.requires_grad_("layer_norm" in key)
        else:
            model = get_hyperformer_model(t5, HyperFormerConfig(tasks=[f"task {i}" for i in range(8)]))
            extra = {"task_index": torch.arange(B) % 8}
        model.train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(model=model, optimiser=optimiser, extra=extra, backend="auto" if name == "bare" else name):
            with use_backend(backend):
                model(input_ids=ids, labels=labels, **extra).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        calls[name] = step
    times = interleaved(calls, rounds)
    return {name: times[name] / times["bare"] for name in BACKENDS}


def apart(a: list[float], b: list[float]) -> list[float]:
    return [abs(x - y) / abs(x) for x, y in zip(a, b)]


def plot(curves: dict[str, list[float]], where: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    steps = range(1, len(curves["reference"]) + 1)
    for style, name in zip(("-", "--"), BACKENDS):
        left.plot(steps, curves[name], style, label=name)
    left.set(xlabel="step", ylabel="loss", title="training loss of the demo, float32")
    left.legend(frameon=False)
    for color, name in zip(("C1", "0.6"), ("cpu", CONTROL)):
        right.plot(steps, [max(gap, 1e-9) for gap in apart(curves["reference"], curves[name])], color=color, label=name)
    right.axhline(1e-4, color="0.4", linewidth=1, linestyle=":")
    right.set(xlabel="step", yscale="log", title="relative difference from the reference's loss")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(described(where), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, help="default: the demo's")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three steps, one layer, one round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    where = machine()
    curves, beside = {}, {}
    for name in track((*BACKENDS, CONTROL), "training"):
        with tempfile.TemporaryDirectory() as folder, one_ulp_off() if name == CONTROL else contextlib.nullcontext():
            backend = "reference" if name == CONTROL else name
            steps = 3 if options.quick else options.steps
            curves[name], beside[name] = losses(backend, steps, folder, options.learning_rate)
    gaps = {name: apart(curves["reference"], curves[name]) for name in ("cpu", CONTROL)}
    same_weights = max(apart(beside["cpu"], curves["cpu"]))
    print(f"cpu: off the reference's loss at the same weights by {same_weights:.1e} at most")
    B, L, layers = (2, 8, 1) if options.quick else (8, 128, options.layers)
    ratios = step_ratios(layers, B, L, 1 if options.quick else options.rounds)
    for name, gap in gaps.items():
        within = next((i for i, value in enumerate(gap) if value > 1e-4), len(gap))
        print(
            f"{name}: off the reference's loss by {max(gap):.1e} at most in {len(gap)} steps; within 1e-4 for {within}"
        )
    show(f"A step over the bare T5's: T5-base with {layers}+{layers} layers, B={B}, L={L} and {L // 4}, 8 tasks mixed",
         where, BACKENDS, [[ratios[name] for name in BACKENDS]])  # fmt: skip
    results = {
        "difference": {name: max(gap) for name, gap in gaps.items()}, "difference_at_same_weights": same_weights,
        "losses": curves, "step_over_bare": ratios,
    }  # fmt: skip
    rate = "" if options.learning_rate is None else f"-lr{options.learning_rate:g}"
    path = write("training" + rate, where, results, options.output)
    plot(curves, where, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
