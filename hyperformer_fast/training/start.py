"""What a run starts from: a T5 that gets adapters, or the weights of an earlier run (``init_from``)."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..config import HyperFormerConfig
from ..data import TaskData
from ..model import HyperFormerModel, get_hyperformer_model
from ..tiny import name_of
from .arguments import EMBEDDED, RunArguments, RunConfigError
from .base import fuse_of, load_base, load_tokenizer
from .evaluate import weights_folder
from .folder import RUN_NAME, read_run, tasks_before
from .progress import say
from .settle import VARIANT_FLAGS

#: Fields of a TaskSpec that decide what the model reads and writes.
_TEXTS = ("source", "columns", "prefix", "target", "labels", "label_names", "target_template", "step")


def say_other_texts(arguments: RunArguments, data: dict[str, TaskData], console: Console) -> None:
    """Say which tasks of ``init_from`` have other texts now than those that its weights were trained on."""
    for name, before in tasks_before(arguments).items():
        differ = [f for f in _TEXTS if name in data and getattr(data[name].spec, f) != getattr(before, f)]
        if differ:
            say(
                console,
                f"warning: {name} has another {' and '.join(differ)} than in {arguments.model.init_from}, whose "
                "weights were trained on other texts (see text_style and add_prefix)",
            )


def build_model(
    arguments: RunArguments, trained: Sequence[str], tasks: Sequence[str] | None = None
) -> tuple[HyperFormerModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) that a run starts from.

    Args:
        arguments: the run's arguments.
        trained: the tasks that are trained.
        tasks: all tasks of the run, with those that are only evaluated; None for ``trained``.

    Raises:
        RunConfigError: a task is to be evaluated that nothing trains, or the adapters differ from ``init_from``'s.
    """
    tasks = list(trained) if tasks is None else list(tasks)
    fuse = fuse_of(arguments.model)
    start = arguments.model.init_from
    if start is None:
        config = arguments.hyperformer_config(tasks)
        _expect_trained([task for task in tasks if task not in trained and config.variant != "finetuning"])
        t5, tokenizer = load_base(arguments.model)
        return get_hyperformer_model(t5, config, fuse), tokenizer
    weights = weights_folder(start, Console()) if Path(start).is_dir() else Path(start)
    base = arguments.model.model_name_or_path or _base_of(Path(start))
    if base is None:
        model = HyperFormerModel.from_pretrained(weights, fuse=fuse, **_of_the_hub(arguments))
        tokenizer = load_tokenizer(arguments.model, name_of(cast(Any, model.t5)))
    else:
        t5, tokenizer = load_base(arguments.model, base)
        model = HyperFormerModel.from_pretrained(weights, t5=t5, fuse=fuse, **_of_the_hub(arguments))
    config = model.hyperformer_config
    _expect_same_adapters(arguments, config)
    _expect_trained([task for task in tasks if task not in trained and task not in config.tasks])
    for task in tasks:
        if task not in model.hyperformer_config.tasks:
            model.add_task(task)
    return model, tokenizer


def _expect_same_adapters(arguments: RunArguments, config: HyperFormerConfig) -> None:
    start = arguments.model.init_from
    given = {name: value for name, value in vars(arguments.adapters).items() if value is not None}
    theirs = {name: getattr(config, name) for name, value in given.items() if value != getattr(config, name)}
    if not theirs:
        return
    differing = [f"{name}={given[name]!r}, but init_from={start!r} has {value!r}" for name, value in theirs.items()]
    flags = {name: value for name, value in theirs.items() if value is not None}
    if any(name in flags for name in VARIANT_FLAGS):  # --variant replaces them
        flags = {"variant": config.variant, **{n: v for n, v in flags.items() if n not in VARIANT_FLAGS}}
    said = " ".join(f"--{name} {shlex.quote(_as_flag(value))}" for name, value in flags.items())
    also = f", or, if a configuration file has or implies it (as the authors' files do), add {said}" if said else ""
    raise RunConfigError(f"{'; '.join(differing)}: leave it out{also}")


def _as_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _expect_trained(others: Sequence[str]) -> None:
    if others:
        raise RunConfigError(
            f"eval_tasks has {', '.join(others)}, which nothing trains: add it to tasks, or start from a run that "
            "has it (init_from)"
        )


def with_earlier_texts(arguments: RunArguments) -> RunArguments:
    """Let the sources of a run that starts from another's weights begin as those did that it was trained on."""
    start = arguments.model.init_from
    if start is None:
        return arguments
    earlier = next((f for f in (Path(start), Path(start).parent) if (f / RUN_NAME).is_file()), None)
    before = None if earlier is None else read_run(earlier)[0]
    if arguments.data.add_prefix is None:
        adds = arguments.adds_prefix
        if before is not None:
            adds = before.adds_prefix
        else:
            with contextlib.suppress(OSError, ValueError):  # build_model says what is wrong with it
                adds = HyperFormerConfig.from_pretrained(start, **_of_the_hub(arguments)).variant == "finetuning"
        if adds != arguments.adds_prefix:
            arguments.data.add_prefix = adds
    return arguments


def _of_the_hub(arguments: RunArguments) -> dict[str, Any]:
    return {"cache_dir": arguments.model.cache_dir, "token": arguments.model.token}


def _base_of(start: Path) -> str | None:
    """Return the T5 of an earlier run, if its folder says so."""
    for folder in (start, start.parent):
        if (folder / RUN_NAME).is_file():
            return read_run(folder)[0].model.model_name_or_path or EMBEDDED
    return None
