"""Train the demo with the reference and with the kernels, and time a step beside the bare T5's.

python benchmarks/training.py [--steps 50] [--learning-rate X] [--layers 4] [--rounds 9] [--quick] [--output DIR]
"""

from __future__ import annotations

import contextlib
import tempfile

import torch
from demo import demo_trainer
from plots import apart, draw
from rich.progress import track
from step import BARE, steps
from timing import arguments, interleaved, machine, show, write
from transformers import TrainerCallback

from hyperformer_fast.backends import use_backend
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.training import HyperFormerTrainer
from hyperformer_fast.training.progress import quiet

BACKENDS = ("reference", "cpu")
CONTROL = "reference, weights one ulp off"


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


class Recording(HyperFormerTrainer):
    """Records each step's loss, and the reference's loss with the same weights and batch.

    The Trainer's log would round losses to four decimals.
    """

    losses: list[float]
    beside: list[float]

    def training_step(self, model, inputs, *args, **kwargs):
        # the embedded T5 has no dropout, so this draws no random numbers
        with torch.no_grad(), use_backend("reference"):
            self.beside.append(model(**self._prepare_inputs(dict(inputs))).loss.item())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss


@contextlib.contextmanager
def one_ulp_off():
    """Make the reference's weights 2^-23 too large, to see how far training itself carries a rounding error."""
    original = ReferenceBackend.generate_weights
    ReferenceBackend.generate_weights = lambda *args: original(*args) * (1 + 2**-23)
    try:
        yield
    finally:
        ReferenceBackend.generate_weights = original


def losses(
    backend: str, steps: int, output: str, learning_rate: float | None = None
) -> tuple[list[float], list[float]]:
    """The losses of the first steps of the demo in float32, and the reference's losses at the same weights.

    The learning rate follows the schedule of the whole run.
    """
    trainer = demo_trainer(Recording, output, **({} if learning_rate is None else {"learning_rate": learning_rate}))
    trainer.losses, trainer.beside = [], []
    quiet(trainer)
    trainer.add_callback(StopAfter(steps))
    with use_backend(backend):
        trainer.train()
    return trainer.losses, trainer.beside


def main() -> None:
    parser = arguments(__doc__, rounds=9, quick="three steps, one layer, one round")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, help="default: the demo's")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    where = machine()
    curves, beside = {}, {}
    for name in track((*BACKENDS, CONTROL), "training"):
        with tempfile.TemporaryDirectory() as folder, one_ulp_off() if name == CONTROL else contextlib.nullcontext():
            backend = "reference" if name == CONTROL else name
            count = 3 if options.quick else options.steps
            curves[name], beside[name] = losses(backend, count, folder, options.learning_rate)
    gaps = {name: apart(curves["reference"], curves[name]) for name in ("cpu", CONTROL)}
    same_weights = max(apart(beside["cpu"], curves["cpu"]))
    print(f"cpu: off the reference's loss at the same weights by {same_weights:.1e} at most")
    B, L, layers = (2, 8, 1) if options.quick else (8, 128, options.layers)
    times = interleaved(steps("T5-base", layers, B, L, BACKENDS), 1 if options.quick else options.rounds)
    ratios = {name: times[name] / times[BARE] for name in BACKENDS}
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
    draw(path)


if __name__ == "__main__":
    main()
