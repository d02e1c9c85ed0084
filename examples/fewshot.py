"""Few-shot transfer: train on some tasks, then adapt the model to a new one from a few rows.

    python examples/fewshot.py                       # the built-in tasks and the embedded tiny T5: seconds
    python examples/fewshot.py --steps 1000 --samples 4 16 64 256 --seeds 5

The new task starts from the task embedding of a trained one, as in the paper. `hyperformer-fast fewshot RUN` does the
same for a finished run, against the paper's baselines.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model
from hyperformer_fast.data import HyperFormerDataCollator, TaskData, encode, load_tasks
from hyperformer_fast.tiny import load_tiny
from hyperformer_fast.training import HyperFormerTrainer, HyperFormerTrainingArguments

TRAINED, NEW, NEAREST = ["topic", "entailment"], "paraphrase", "entailment"


def trainer_of(
    model: HyperFormerModel,
    tasks: Mapping[str, TaskData],
    train: Dataset,
    validation: Dataset,
    folder: Path,
    **changes: object,
) -> HyperFormerTrainer:
    """Return a trainer of some encoded rows."""
    arguments = HyperFormerTrainingArguments(
        output_dir=str(folder), learning_rate=3e-3, per_device_train_batch_size=16, save_strategy="no", **changes
    )
    tokenizer = load_tiny()[1]
    return HyperFormerTrainer(
        model,
        arguments,
        data_collator=HyperFormerDataCollator(tokenizer, model),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        tasks={name: task.spec for name, task in tasks.items()},
    )


def main(arguments: Sequence[str] | None = None) -> dict[int, list[float]]:
    """Return, for each number of samples, the accuracy on the new task with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps on the first tasks, and on the new one")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16], help="numbers of rows of the new task")
    parser.add_argument("--seeds", type=int, default=2, help="number of draws of these rows")
    parser.add_argument("--rows", type=int, default=40, help="validation rows to score on")
    parser.add_argument("--output_dir", type=Path, default=Path("fewshot"), help="folder of the trained model")
    options = parser.parse_args(arguments)

    t5, tokenizer = load_tiny()
    tasks = load_tasks(None, [*TRAINED, NEW])
    # An example's task_index is that of its task in the model, which the new task will join as the last.
    encoded = {
        split: {name: encode(task, split, tokenizer, 128, index=i) for i, (name, task) in enumerate(tasks.items())}
        for split in ("train", "validation")
    }

    # First the tasks with many rows.
    model = get_hyperformer_model(t5, HyperFormerConfig(tasks=TRAINED, reduction_factor=4))
    train = concatenate_datasets([encoded["train"][name] for name in TRAINED])
    trainer_of(model, tasks, train, None, options.output_dir, max_steps=options.steps).train()
    model.save_pretrained(options.output_dir)

    # Then the new one: always from the same weights, on another draw of a few rows each time.
    validation = encoded["validation"][NEW].select(range(options.rows))
    found: dict[int, list[float]] = {}
    for count in options.samples:
        for seed in range(options.seeds):
            model = HyperFormerModel.from_pretrained(options.output_dir)
            model.add_task(NEW, init_from=NEAREST)
            few = encoded["train"][NEW].shuffle(seed=seed).select(range(count))
            trainer = trainer_of(
                model, {NEW: tasks[NEW]}, few, {NEW: validation}, options.output_dir, max_steps=options.steps, seed=seed
            )
            trainer.train()
            found.setdefault(count, []).append(trainer.evaluate()[f"eval_{NEW}_accuracy"])
        mean, deviation = statistics.mean(found[count]), statistics.pstdev(found[count])
        print(f"{NEW} from {count} rows: accuracy {mean:.1f} +- {deviation:.1f}")
    return found


if __name__ == "__main__":
    main()
