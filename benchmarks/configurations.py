"""What the runs of a study are given: the methods, where they learn, and the arguments of each run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import machine

import hyperformer_fast
from hyperformer_fast.data import available_tasks, builtin
from hyperformer_fast.data.builtin import BUILTIN_SPECS, SIZES, load_builtin
from hyperformer_fast.initialisation import POST_GAMMA, TASK_PART, TASK_SHARE, UP_SHARE
from hyperformer_fast.learning_rates import FAN_IN_EXPONENT
from hyperformer_fast.recipes import RECIPES
from hyperformer_fast.training.presets import PRESETS

#: In the order of the tables. "single_task": adapters that each task trains in a run of its own.
METHODS = ("finetuning", "single_task", "adapters", "hyperformer", "hyperformer-shared", "hyperformer++")
TEXT_TASKS = ("sst2", "trec", "cola", "mrpc", "stsb", "rte")
#: The new tasks of a transfer.
TEXT_TRANSFER, BUILTIN_TRANSFER = ("trec", "scitail"), builtin.TRANSFER_TASKS
#: On real text. No single rate suits both adapters and a whole T5.
LEARNING_RATES = {"finetuning": 5e-4, "adapters": 3e-3, "hyperformer": 3e-3, "hyperformer++": 3e-3}
#: There, of generators by the authors' recipe, whose rate is not divided: the best of HyperFormer++ in the sweep of
#: `study.py rates` on validation rows.
UNDIVIDED_RATE = 1e-3
PACKAGE = Path(hyperformer_fast.__file__).parent
#: The T5 that is part of it.
EMBEDDED = PACKAGE / "assets" / "tiny_t5"
#: Longest source, reduction factor and width of the task embeddings on real text.
TEXT_SIZES = {"length": 64, "reduction": 16, "embedding": 32}
#: What a run of "hyperformer++" by the default recipe may have otherwise, one thing each time. PCGrad and per-task
#: clipping act on mixed batches, as all runs of `study.py options` have.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "zero_delta": {"zero_delta": True},
    "init_weights hyperfan_out": {"init_weights": "hyperfan_out"},
    "init_weights authors": {"init_weights": "authors"},
    "embeddings not normalised": {"normalize_embeddings": False},
    "learning_rate_rule uniform": {"learning_rate_rule": "uniform"},
    "learning_rate_rule uniform, 1e-3": {
        "learning_rate_rule": "uniform",
        "learning_rate": 1e-3,
    },  # what the demo's preset gives it
    "embedding_warmup_steps, a quarter": {"embedding_warmup_steps": 0.25},
    "max_task_grad_norm 0.1": {"max_task_grad_norm": 0.1},
    "gradient_surgery pcgrad": {"gradient_surgery": "pcgrad"},
}
#: What a study decides itself for each run of the preset "demo".
_DECIDED = frozenset("max_steps warmup_steps learning_rate eval_steps save_steps max_eval_samples".split())


@dataclasses.dataclass(frozen=True, order=True)
class Line:
    """A line of a study: a method, with the recipe by which it is trained if it has one."""

    method: str
    recipe: str | None = None

    @property
    def label(self) -> str:
        return self.method if self.recipe is None else f"{self.method} ({self.recipe})"

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments that make a run one of this line."""
        of_method = {"variant": self.method}
        if self.method == "single_task":
            of_method = {"variant": "adapters", "single_task": True}
        return of_method if self.recipe is None else {**of_method, "recipe": self.recipe}


def text_rate(line: Line) -> float:
    """The learning rate of a line on real text, where none is given."""
    if line.recipe == "authors" and line.method.startswith("hyperformer"):
        return UNDIVIDED_RATE
    return LEARNING_RATES.get(line.method, LEARNING_RATES["hyperformer++"])


def lines(methods: Iterable[str], recipes: Sequence[str]) -> list[Line]:
    """Each method with each of the recipes, or with the one that is named behind it: ``adapters:default``.

    Full fine-tuning has none, because a recipe says how adapters start and learn.
    """
    found = []
    for name in methods:
        method, _, recipe = name.partition(":")
        if method == "finetuning":
            found.append(Line(method))
        else:
            found += [Line(method, each) for each in ([recipe] if recipe else recipes)]
    return list(dict.fromkeys(found))


def text_options(parser: argparse.ArgumentParser, steps: int | None = 1500, batch: int | None = 16) -> None:
    """Add what runs on real text are given."""
    number = functools.partial(parser.add_argument, type=int)
    default = {name: "" if value is None else f" (default: {value})" for name, value in (("s", steps), ("b", batch))}
    number("--steps", default=steps, help=f"optimizer steps of each run{default['s']}")
    number("--batch", default=batch, help=f"rows of a batch{default['b']}")
    number("--length", default=TEXT_SIZES["length"], help="longest source in tokens (default: %(default)s)")
    number("--reduction", default=TEXT_SIZES["reduction"], help="adapters' reduction factor (default: %(default)s)")
    number("--embedding", default=TEXT_SIZES["embedding"], help="width of task embeddings (default: %(default)s)")
    number("--eval-rows", default=400, help="rows of each task to evaluate (default: %(default)s)")
    number("--jobs", default=1, help="runs at a time (default: %(default)s)")


def text_configuration(
    options: argparse.Namespace, fields: Mapping[str, Any], tasks: Sequence[str], rate: float, seed: int
) -> dict[str, Any]:
    """The arguments of one run on real text, as `hyperformer-fast train` reads them.

    Finished runs are recognised by this content in this order.
    """
    return {
        "model_name_or_path": str(Path(options.t5).resolve()),
        "data_dir": str(Path(options.data).resolve()),
        "tasks": list(tasks),
        **fields,
        "reduction_factor": options.reduction,
        "task_embedding_dim": options.embedding,
        "projected_task_embedding_dim": options.embedding,
        "max_steps": options.steps,
        "warmup_steps": options.steps // 10,
        "learning_rate": rate,
        "per_device_train_batch_size": options.batch,
        "max_source_length": options.length,
        "max_predict_samples": options.eval_rows,
        "seed": seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 20,
    }


def builtin_configuration(
    options: argparse.Namespace, fields: Mapping[str, Any], tasks: Sequence[str], rate: float, seed: int
) -> dict[str, Any]:
    """The arguments of one run on the embedded T5 and the built-in tasks: those of the preset "demo".

    They are spelt out, so that a run is not taken for finished once the preset is another.
    """
    preset = PRESETS["demo"]
    config = {
        **{name: value for name, value in preset.items() if name not in _DECIDED},
        "tasks": list(tasks),
        **fields,
        "max_steps": options.steps,
        "warmup_steps": preset.get("warmup_steps", 0) * options.steps // preset["max_steps"],
        "learning_rate": rate,
        "per_device_train_batch_size": options.batch,
        "max_predict_samples": options.eval_rows,
        "seed": seed,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    return {name: value for name, value in config.items() if value is not None}


def configuration(
    options: argparse.Namespace, line: Line, tasks: Sequence[str], rate: float, seed: int
) -> dict[str, Any]:
    """The arguments of one run of a study.

    Tasks that are trained one by one share the steps evenly, so that they see as many rows together as where all tasks
    are trained by one run. A task without labelled test rows is cut by the authors' rule, so that what is chosen on
    validation rows is not reported on them.
    """
    steps = max(1, options.steps // len(tasks)) if line.method == "single_task" else options.steps
    of_run = argparse.Namespace(**{**vars(options), "steps": steps})
    make = builtin_configuration if options.t5 is None else text_configuration
    config = make(of_run, line.fields, tasks, rate, seed)
    if options.data is not None:
        config["split_validation_test"] = True
    return {**config, **options.set}


def named(work: Path, line: Line, rate: float, seed: int, config: Mapping[str, Any], contents: str) -> Path:
    """The folder of a run. Its name ends in a digest of all that the run depends on.

    Args:
        work: where all runs are kept.
        line, rate, seed: what a person tells runs apart by.
        config: the run's arguments.
        contents: a digest of its T5 and data, and of the code and machine (``contents_of``).
    """
    depends = json.dumps([config, contents, recipe_fields(line.recipe)], sort_keys=True)
    label = line.method if line.recipe is None else f"{line.method}-{line.recipe}"
    return (work / f"{label}-{rate:g}-{seed}-{_digest(depends.encode())}").resolve()


def recipe_fields(name: str | None) -> dict[str, Any]:
    """What a recipe sets, by field, with the numbers of the formulas that it names; nothing where there is none.

    Runs by other numbers are not taken for runs by these.
    """
    if name is None:
        return {}
    recipe = RECIPES[name]
    numbers = {}
    if recipe.init_weights != "authors":
        numbers = {"up_share": UP_SHARE, "post_gamma": POST_GAMMA, "task_share": TASK_SHARE, "task_part": TASK_PART}
    if recipe.learning_rate_rule == "fan_in":
        numbers["fan_in_exponent"] = FAN_IN_EXPONENT
    return {**recipe._asdict(), **numbers}


def contents_of(options: argparse.Namespace, tasks: Sequence[str]) -> str:
    """A digest of the T5 and the tasks' rows, of the library's code, the libraries below it and the processor, which
    round differently, so that runs of or on earlier ones are not taken for runs of or on these."""
    where = [machine()["cpu"], torch.__version__, transformers.__version__]
    found = hashlib.sha256(json.dumps(where).encode())
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".so")):
        found.update(f"{path.relative_to(PACKAGE)}".encode())
        found.update(path.read_bytes())
    folders = [EMBEDDED if options.t5 is None else Path(options.t5)]
    folders += [Path(options.data) / task for task in tasks] if options.data is not None else []
    for path in [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]:
        found.update(f"{path.parent.name}/{path.name}".encode())
        found.update(path.read_bytes())
    if options.data is None:
        found.update(json.dumps([load_builtin(task, split) for task in tasks for split in SIZES]).encode())
    return found.hexdigest()


def with_builtin(work: Path, data: Path) -> Path:
    """Make a folder of all tasks of ``data`` and of the built-in ones, which are written out; return it.

    Raises:
        SystemExit: a task of the folder has the name of a built-in one.
    """
    others = available_tasks(str(data))
    if both := set(others) & set(BUILTIN_SPECS):
        raise SystemExit(f"{data} has tasks with the names of built-in ones ({', '.join(sorted(both))}): rename them")
    rows = {
        f"{task}/{split}.jsonl": "".join(json.dumps(row) + "\n" for row in load_builtin(task, split))
        for task in BUILTIN_SPECS
        for split in SIZES
    }
    folder = (work / f"data-{_digest(json.dumps([rows, str(data.resolve()), others]).encode())}").resolve()
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        for name, content in rows.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(content)
        for task in others:
            (partial / task).symlink_to((data / task).resolve(), target_is_directory=True)
        partial.rename(folder)
    return folder


def option_fields(name: str, steps: int) -> dict[str, Any]:
    """The arguments of one of OPTIONS in a run of so many steps. The embeddings warm up over a share of these."""
    fields = dict(OPTIONS[name])
    if share := fields.get("embedding_warmup_steps"):
        fields["embedding_warmup_steps"] = max(1, round(share * steps))
    return fields


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:10]
