"""Pretrain the embedded T5, and its tokenizer, on text without labels.

    python tools/pretrain_tiny.py --text-dir DIR [DIR ...] --output hyperformer_fast/assets/tiny_t5

Below the folders it reads .txt files, the strings of .jsonl files, and WordNet's glosses; besides, the unlabelled
sentences of the built-in tasks and the prose about their world. Progress is kept in PARTIAL, from which the same
command continues. The same arguments make the same weights on the same machine: one thread computes, and a batch
depends on the seed and the step alone. docs/tiny_t5.md says how the shipped weights were made.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from pathlib import Path

import torch
from pretraining.model import Pretraining, State, save_model
from pretraining.objectives import Objectives, lesson_at
from pretraining.text import read_sentences
from pretraining.tokenizer import WordIds, train_tokenizer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from hyperformer_fast.data.builtin import unlabelled_text
from hyperformer_fast.data.builtin_prose import Prose

WARM_UP = 100
#: Passages of prose that the tokenizer is trained on.
PASSAGES = 30_000


def rate_at(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a warm-up, the lessons' plateaus, and a linear decay to nothing
    in the last third.

    Up to the decay the weights do not depend on the number of steps, so that it can still be changed.
    """
    return min((step + 1) / WARM_UP, lesson_at(step).rate * min(1.0, (steps - step) / (steps - decay_from(steps))))


def decay_from(steps: int) -> int:
    return 2 * steps // 3


def train(state: State, objectives: Objectives, arguments: argparse.Namespace) -> None:
    """Train to the last step."""
    columns = (TextColumn("step {task.completed}  {task.fields[loss]}"), BarColumn(), TimeRemainingColumn())
    averages: dict[str, float] = dict(state.losses.get(str(state.step), {}))
    kept = state.minutes
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=arguments.steps, completed=state.step, loss="")
        while state.step < arguments.steps:
            started = time.perf_counter()
            for group in state.optimizer.param_groups:
                group["lr"] = arguments.learning_rate * rate_at(state.step, arguments.steps)
            losses = state.model(objectives.batch(arguments.batch_size, state.step))
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            for name, loss in losses.items():
                averages[name] = 0.98 * averages.get(name, loss.item()) + 0.02 * loss.item()
            state.step, state.minutes = state.step + 1, state.minutes + (time.perf_counter() - started) / 60
            if state.step % 100 == 0:
                state.losses[str(state.step)] = {name: round(value, 4) for name, value in averages.items()}
                shown = "  ".join(f"{name} {value:.2f}" for name, value in averages.items())
                progress.update(bar, completed=state.step, loss=shown)
                if not progress.console.is_terminal:
                    print(f"{state.minutes:.1f} min, step {state.step}: {shown}", flush=True)
            if state.minutes - kept > arguments.keep_minutes:
                kept = state.minutes
                state.keep()
    state.keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-dir", type=Path, nargs="*", default=[], help="folders of text files or of WordNet's")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--partial", type=Path, help="folder of the progress (default: OUTPUT.partial)")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="pieces and sentinels of the tokenizer; 359 is bytes alone"
    )
    parser.add_argument("--steps", type=int, default=14_000, help="steps of all resumed runs together")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-minutes", type=float, default=3, help="time between two states that are kept")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    general, builtin, prose = read_sentences(arguments.text_dir), list(unlabelled_text()), Prose()
    draw = random.Random(f"tokenizer {arguments.seed}")
    passages = (sentence for _ in range(PASSAGES) for sentence in prose.passage(draw))
    tokenizer = train_tokenizer(itertools.chain(builtin, builtin, passages, general), arguments.vocab_size)

    objectives = Objectives(general, builtin, prose, WordIds(tokenizer), arguments.seed)
    torch.manual_seed(arguments.seed)
    model = Pretraining(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    partial = arguments.partial or arguments.output.with_name(arguments.output.name + ".partial")
    given = {name: getattr(arguments, name) for name in ("batch_size", "learning_rate", "seed", "vocab_size")}
    state = State(partial, model, optimizer, {**given, "sentences": len(general)})
    if state.steps not in (None, arguments.steps) and state.step > min(map(decay_from, (state.steps, arguments.steps))):
        raise SystemExit(f"{partial} is at step {state.step} of {state.steps}, which is too late for {arguments.steps}")
    state.steps = arguments.steps
    print(
        f"{len(general):,} sentences of text, {len(builtin):,} of the built-in tasks, {len(tokenizer):,} pieces, "
        f"{model.t5.num_parameters():,} parameters",
        flush=True,
    )
    train(state, objectives, arguments)
    save_model(model.t5.eval(), tokenizer, arguments.output)
    print(f"{arguments.output}: {state.step} steps, {state.minutes:.1f} minutes")


if __name__ == "__main__":
    main()
