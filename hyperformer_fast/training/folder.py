"""The run folder: its files, which of its checkpoints are complete, and how they are removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__, model_card
from ..atomic import recover_directory, sweep_leftovers, write_file
from ..checkpoint import (
    CONFIG_NAME,
    OLD_CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    WEIGHTS_NAME,
    CheckpointFile,
    weights_file,
)
from ..config import HyperFormerConfig
from ..data import TaskData, TaskSpec
from ..json_files import parse, read_object
from ..recipes import BEFORE_RECIPES
from .arguments import RunArguments
from .in_effect import in_effect

RUN_NAME = "run.json"
HISTORY_NAME = "history.json"
METRICS_NAME = "metrics.json"
CURVES_NAME = "curves.png"
DIAGNOSTICS_NAME = "diagnostics.png"
EVALUATION_NAME = "evaluation.json"
BEST = "best"
STAGING = ".saving"

FORMAT_VERSION = 1

#: What a checkpoint must have, each under one of these names (those of a single process and DDP, of FSDP, and of
#: DeepSpeed). Without one of them a resumed run would silently train something else.
NEEDED = (
    ("trainer_state.json",),
    ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest"),
    ("scheduler.pt", "latest"),
    (WEIGHTS_NAME, OLD_WEIGHTS_NAME, "pytorch_model_fsdp_0", "latest"),
)

_WEIGHTS = (WEIGHTS_NAME, OLD_WEIGHTS_NAME)
#: The files of a model in a run.
OF_THE_MODEL = (*_WEIGHTS, CONFIG_NAME, OLD_CONFIG_NAME, model_card.NAME)
_FILES = (RUN_NAME, *OF_THE_MODEL, METRICS_NAME, HISTORY_NAME, CURVES_NAME, DIAGNOSTICS_NAME, EVALUATION_NAME)

#: Arguments that may differ when a run is resumed, because they do not change what is trained; and those of its length
#: and of how a batch is divided, which are compared by themselves.
MAY_CHANGE = frozenset(
    """output_dir cache_dir token overwrite_cache preprocessing_num_workers overwrite_output_dir resume_from_checkpoint
    preset eval_tasks max_eval_samples max_predict_samples val_max_target_length test_max_target_length
    generation_max_length generation_num_beams per_device_eval_batch_size eval_accumulation_steps eval_delay
    eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit save_only_model logging_strategy
    logging_steps diagnostics_steps logging_first_step logging_nan_inf_filter logging_dir log_level log_on_each_node
    report_to run_name project disable_tqdm push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience
    early_stopping_threshold
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    restore_callback_states_from_checkpoint ddp_backend ddp_timeout use_cpu local_rank skip_memory_metrics
    include_num_input_tokens_seen
    max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps""".split()
)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunError(ValueError):
    """A run cannot be started, resumed or read; the message says what to do."""


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically."""
    with write_file(path) as partial:
        Path(partial).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. A checkpoint that is being written has another name."""
    return [path for path in _numbered(Path(folder)) if not missing_files(path)]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint or None, and for each newer one what it lacks."""
    passed: list[str] = []
    for path in reversed(_numbered(folder)):
        missing = missing_files(path)
        if not missing:
            return path, passed
        passed.append(f"{path.name} lacks {' and '.join(missing)}")
    return None, passed


def missing_files(checkpoint: Path) -> list[str]:
    """Return the names of the files that resuming needs and the checkpoint lacks."""
    missing = [names[0] for names in NEEDED if not any((checkpoint / name).exists() for name in names)]
    return missing if rng_files(checkpoint) else [*missing, "rng_state*.pth"]


def rng_files(checkpoint: Path) -> set[str]:
    """Return the names of the checkpoint's files with RNG states; each process has one."""
    return {path.name for path in checkpoint.glob("rng_state*.pth")}


def _numbered(folder: Path) -> list[Path]:
    """Return every directory that is named like a checkpoint, in the order of their steps."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if path.is_dir()]


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, which is renamed first so that a kill leaves no incomplete checkpoint under its name.

    If it is a symbolic link, only the link is removed, because its target does not belong to the run.
    """
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}.old")
    remove(doomed)
    os.rename(path, doomed)
    remove(doomed)


def rotate(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints, so that ``limit`` remain; the newest and the best always do. None deletes none."""
    if not limit or limit < 1:
        return
    # Those of save_only_model lack what resuming needs.
    whole = [path for path in _numbered(folder) if (path / "trainer_state.json").is_file()]
    kept = {whole[-1].name if whole else "", Path(best).name if best else ""}
    doomed = [old for old in whole if old.name not in kept]
    for old in doomed[: max(0, len(whole) - max(limit, len(whole) - len(doomed)))]:
        remove_checkpoint(old)


def remove(path: Path) -> None:
    """Delete a file, a directory with its contents, or a symbolic link (but not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise RunError if the folder holds a run."""
    if holds_run(folder):
        raise RunError(
            f"{folder} holds another run: continue it (--resume_from_checkpoint true), replace it "
            "(--overwrite_output_dir), or choose another --output_dir"
        )


def check_own(folder: Path) -> None:
    """Raise RunError if the folder has weights that are of no run: replacing a run would delete somebody's model."""
    found = [name for name in _WEIGHTS if (folder / name).is_file()]
    if found and not (folder / RUN_NAME).is_file():
        raise RunError(
            f"{folder} has {found[0]}, but no {RUN_NAME}, so that it is not a run that could be replaced: choose "
            "another --output_dir"
        )


def holds_run(folder: Path) -> bool:
    """Return whether the folder has weights or results. A ``run.json`` alone does not count: nothing would be lost."""
    return (
        has_weights(folder)
        or (folder / METRICS_NAME).is_file()
        or (folder / BEST).exists()
        or any(folder.glob("checkpoint-*"))
    )


def has_weights(folder: Path) -> bool:
    """Return whether trained weights lie in this very folder."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def clear(folder: Path) -> None:
    """Remove all files of a run, so that none is mistaken for the next run's. Other files in the folder stay."""
    card = folder / model_card.NAME
    # A README.md that is somebody's own is no file of a run; the new run's card leaves it alone, too.
    own = card.is_file() and not model_card.is_ours(card.read_text(encoding="utf-8", errors="replace"))
    for name in _FILES:
        if own and name == card.name:
            continue
        (folder / name).unlink(missing_ok=True)
    remove(folder / BEST)
    for path in folder.glob("checkpoint-*"):
        if _CHECKPOINT.fullmatch(path.name):
            remove_checkpoint(path)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted. Only the process that trains there may call this."""
    for aside in folder.glob(".checkpoint-*.previous"):
        recover_directory(aside.with_name(aside.name[1 : -len(".previous")]))
    leftovers = [folder / STAGING, *folder.glob(".checkpoint-*.previous")]
    # Earlier versions of this library leave the probe file ".writable-PID" if they are killed.
    leftovers += [*folder.glob(".checkpoint-*.old"), *folder.glob(".writable-[0-9]*")]
    for path in leftovers:
        remove(path)
    for place in (folder, folder / BEST):
        sweep_leftovers(place)


def write_run(folder: Path, run: RunArguments, data: dict[str, TaskData], world_size: int = 1) -> None:
    """Write ``run.json``: the arguments, the tasks' specifications, the data's fingerprints and library versions."""
    content = {
        "format_version": FORMAT_VERSION,
        "arguments": {"fuse": run.model.fuse, "recipe": run.adapters.recipe, **run.to_dict()},
        "tasks": {name: task.spec.to_dict() for name, task in data.items()},
        "kept_tasks": {name: spec.to_dict() for name, spec in tasks_before(run).items() if name not in data},
        "data": {name: task.fingerprint() for name, task in data.items()},
        "selecting": run.selects,
        "examples_per_step": examples_per_step(run, world_size),
        "versions": {"hyperformer_fast": __version__, **_versions("torch", "transformers")},
    }
    write_json(folder / RUN_NAME, content)


def tasks_before(run: RunArguments) -> dict[str, TaskSpec]:
    """Return the tasks of the run that this one starts from: its weights still serve them."""
    content = content_before(run)
    tasks = {} if content is None else content["tasks"]
    return {name: TaskSpec.from_dict(fields) for name, fields in tasks.items()} | kept_tasks(content or {})


def content_before(run: RunArguments) -> dict[str, Any] | None:
    """Return the content of ``run.json`` of the run that this one starts from, if there is one."""
    start = Path(run.model.init_from or "")
    for folder in (start, start.parent) if run.model.init_from else ():
        if (folder / RUN_NAME).is_file():
            # Not by read_run, whose training arguments would reset accelerate's state while this run trains.
            return read_object(folder / RUN_NAME)
    return None


def kept_tasks(content: dict[str, Any]) -> dict[str, TaskSpec]:
    """Return the tasks of earlier runs that a run's model has beside its own, by the content of its ``run.json``."""
    return {name: TaskSpec.from_dict(fields) for name, fields in content.get("kept_tasks", {}).items()}


def examples_per_step(run: RunArguments, world_size: int) -> int:
    """Return how many examples an optimizer step takes, in all processes."""
    return run.training.per_device_train_batch_size * run.training.gradient_accumulation_steps * world_size


def read_run(folder: str | Path) -> tuple[RunArguments, dict[str, TaskSpec], dict[str, Any]]:
    """Read (arguments, specifications, the whole content) from ``run.json``.

    The training arguments are only those that an evaluation needs, because others may not suit this machine.

    Raises:
        RunError: the file is absent or cannot be read, or its content is not a run's.
    """
    path = Path(folder) / RUN_NAME
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder} is not the folder of a run: it has no {RUN_NAME}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    try:
        if content["format_version"] != FORMAT_VERSION:
            raise RunError(
                f"{path} has format version {content['format_version']}; this library reads {FORMAT_VERSION}"
            )
        specs = {name: TaskSpec.from_dict(fields) for name, fields in content["tasks"].items()}
        content["data"].items()
        # Runs of releases that fused nothing, and had no recipes, do not say so. To go on, they must draw the masks
        # that they drew, and have the learning rates that they had.
        before = {"fuse": "none", "recipe": BEFORE_RECIPES}
        # What a preset gave is written down field by field, and what another version adds to it was no part of the run.
        written = {name: value for name, value in content["arguments"].items() if name != "preset"}
        run = RunArguments.from_dict({**before, **written}, for_training=False)
        # The folder may have been moved.
        run.training.output_dir = str(folder)
        return run, specs, content
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} does not describe a run: {error!r}") from error


def check_same(folder: Path, run: RunArguments, data: dict[str, TaskData], world_size: int) -> None:
    """Raise RunError if ``run`` on ``data`` would train something else than the run in ``folder``."""
    before, _, content = read_run(folder)
    theirs, ours = before.to_dict(), run.to_dict()
    defaults = RunArguments.from_dict({}, for_training=False)
    differing = [
        name
        for name in sorted((theirs.keys() | ours.keys()) - MAY_CHANGE)
        if _value(theirs, name, defaults) != _value(ours, name, defaults)
    ]
    if differing:
        config = _config_of_checkpoint(folder) if run.model.init_from is not None else None
        meant = in_effect(before, list(content["tasks"]), content.get("selecting", False), config)
        means = in_effect(run, list(data), run.selects, config)
        # The rate follows from others where it is left out, so that these are what changed.
        for name in sorted(differing, key=lambda name: name == "learning_rate"):
            one, other = meant.get(name, _value(theirs, name, defaults)), means.get(name, _value(ours, name, defaults))
            if one != other:
                raise RunError(f"cannot resume {folder}: {name} was {one!r} and is now {other!r}")
    size, was = examples_per_step(run, world_size), content.get("examples_per_step")
    if was is not None and size != was:
        raise RunError(
            f"cannot resume {folder}: an optimizer step took {was} examples and would now take {size} "
            f"(per_device_train_batch_size x gradient_accumulation_steps x processes): {_cure(run, was, world_size)}"
        )
    rows, accumulated = (
        _value(theirs, name, defaults) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    parts = run.training.per_device_train_batch_size, run.training.gradient_accumulation_steps
    each_by_itself = run.training.max_task_grad_norm is not None or run.training.gradient_surgery != "none"
    if each_by_itself and was is not None and parts != (rows, accumulated):
        raise RunError(
            f"cannot resume {folder}: max_task_grad_norm and gradient_surgery change each micro-batch by itself, and "
            f"these would be others: set per_device_train_batch_size to {rows} and gradient_accumulation_steps to "
            f"{accumulated}, in {was // (rows * accumulated)} processes"
        )
    for name, task in data.items():
        if not task.unchanged("train", content["data"].get(name, {}).get("train")):
            raise RunError(f"cannot resume {folder}: the training rows of {name!r} have changed since it started")


def _cure(run: RunArguments, examples: int, world_size: int) -> str:
    batches = run.training.gradient_accumulation_steps * world_size
    if examples % world_size:
        return f"{examples} examples do not divide by {world_size} processes; start a number that divides it"
    if examples % batches:
        return f"set per_device_train_batch_size to {examples // world_size} and gradient_accumulation_steps to 1"
    return f"set per_device_train_batch_size to {examples // batches}"


def _value(flat: Mapping[str, Any], name: str, defaults: RunArguments) -> Any:
    """The value of an argument in a run's flat ones, or its default."""
    if name in flat:
        return flat[name]
    groups = (defaults.model, defaults.data, defaults.adapters, defaults.training)
    return next((getattr(group, name) for group in groups if hasattr(group, name)), None)


def _config_of_checkpoint(folder: Path) -> HyperFormerConfig | None:
    checkpoint, _ = newest_checkpoint(folder)
    if checkpoint is None or weights_file(checkpoint) is None:
        return None
    return HyperFormerConfig.from_dict(CheckpointFile(checkpoint).description.get("config", {}))


def _versions(*names: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
