"""Everything that a training run depends on, as dataclasses for Hugging Face's HfArgumentParser.

``metadata["help"]`` of each field is the one source of the command's help and of the documentation.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, get_type_hints

import torch.distributed as dist
from transformers import EarlyStoppingCallback, TrainerCallback

from .. import official_fields
from ..config import HyperFormerConfig
from ..name_lists import Names
from ..nearest import did_you_mean
from .field_checks import RunConfigError, check_field
from .presets import with_preset, with_rate
from .settle import EMBEDDED, check_together, settled
from .training_arguments import HyperFormerTrainingArguments, refusals_named
from .training_arguments import argument as _argument
from .translate import OLDER_NAMES, today

__all__ = [
    "AdapterArguments",
    "DataArguments",
    "EMBEDDED",
    "HyperFormerTrainingArguments",
    "ModelArguments",
    "RunArguments",
    "RunConfigError",
]


DATA_SEED_HELP = "Random seed of the splits, and of the choice of rows where not all are used."


@dataclasses.dataclass
class ModelArguments:
    """The T5 that a run adapts, and the weights that it starts from."""

    _argument_group_name = "the model"

    model_name_or_path: str | None = _argument(
        None, 'Folder or Hub name of the T5; left out or "embedded": the tiny T5 that is part of this package.'
    )
    tokenizer_name: str | None = _argument(None, "Folder or Hub name of the tokenizer; left out: the T5's own.")
    cache_dir: str | None = _argument(None, "Where downloads from the Hub and prepared data are cached.")
    model_revision: str = _argument("main", "Branch, tag or commit of the T5 on the Hub.")
    token: str | None = _argument(None, "Token for the Hub; it is not written to the run's folder.")
    init_from: str | None = _argument(
        None,
        "Run folder, checkpoint or Hub name whose trained weights this run starts from. Its tasks are kept, new ones "
        "are added.",
    )
    fuse: list[str] | None = _argument(
        None,
        'What is fused in the frozen T5, for speed: "none", "all", or names among products, norm, dropout, '
        "feed_forward, attention, cache and loss. Left out: all that the T5 supports. The results are the same up to "
        "rounding, and dropout draws other random numbers.",
        action=Names,
    )
    preset: str | None = _argument(
        None,
        'Defaults to start from. "demo" suits the embedded T5 on the built-in tasks, and is chosen where the T5 is the '
        "embedded one and no configuration file is given.",
    )


@dataclasses.dataclass
class DataArguments:
    """The tasks of a run and how their rows are read."""

    _argument_group_name = "the tasks and their data"

    data_dir: str | None = _argument(
        None,
        'Folder with a folder of files for each task, or "hub:glue" for GLUE\'s eight tasks from the Hub. Left out: '
        "each task comes from where its entry says (built-in rows or the Hub).",
    )
    tasks: list[str] | None = _argument(
        None, "Names of the tasks to train; left out: all tasks in the data.", action=Names
    )
    eval_tasks: list[str] | None = _argument(
        None, "Names of the tasks to evaluate; left out: those that are trained.", action=Names
    )
    task_file: str | None = _argument(None, "YAML or JSON file with entries of further tasks.")
    single_task: bool = _argument(
        False, "Train each task in a run of its own under output_dir/<task>, with one table at the end."
    )
    text_style: str = _argument(
        "default",
        'How rows become text: "default", or "official" for exactly the texts of the authors\' code, which their '
        "checkpoints were trained on.",
    )
    add_prefix: bool | None = _argument(
        None,
        'Put a task\'s name before each of its sources. Left out: only with variant "finetuning", because nothing else '
        "tells such a model the task.",
    )
    max_source_length: int = _argument(128, "Longest source, in tokens; longer ones are truncated.")
    max_target_length: int | None = _argument(
        None, "Longest target while training, in tokens; left out: as each task's entry says."
    )
    val_max_target_length: int | None = _argument(
        None,
        "Longest text generated in evaluations while training, in tokens; left out: max_target_length. A task's own "
        "(max_target_length or generation of its entry) comes first, as in the authors' code.",
    )
    test_max_target_length: int | None = _argument(
        None,
        "Longest text generated in the final evaluation, in tokens; left out: max_target_length. A task's own comes "
        "first.",
    )
    max_train_samples: int | None = _argument(
        None,
        "Use at most N training rows of each task, as in the paper's study of low resources (the authors' n_train).",
        aliases="--samples",
    )
    max_eval_samples: int | None = _argument(
        None, "Use the first N validation rows of each task in evaluations while training (the authors' n_val)."
    )
    max_predict_samples: int | None = _argument(
        None, "Use the first N rows of each task in the final evaluation (the authors' n_test)."
    )
    split_validation_test: bool | None = _argument(
        None,
        "Cut validation and test rows out of the labelled splits by the authors' rule where a task has no labelled "
        "test split. Left out: only where the run selects a checkpoint on validation.",
    )
    data_seed: int = _argument(42, DATA_SEED_HELP)
    overwrite_cache: bool = _argument(False, "Prepare the data again instead of reading what is cached.")
    preprocessing_num_workers: int | None = _argument(None, "Processes that prepare the data.")
    ignore_pad_token_for_loss: bool = _argument(True, "Leave padding of the targets out of the loss.")


def _optional(field: dataclasses.Field[Any], hint: Any) -> tuple[str, Any, Any]:
    """A field of HyperFormerConfig as one that may be left out."""
    if "dict" in str(hint):
        hint = dict | str  # a flag gives it as JSON
    return field.name, hint | None, dataclasses.field(default=None, metadata=field.metadata)


_ADAPTER_HINTS = get_type_hints(HyperFormerConfig)

#: The fields of HyperFormerConfig except ``tasks``; None where a field is not given.
AdapterArguments: Any = dataclasses.make_dataclass(
    "AdapterArguments",
    [
        _optional(field, _ADAPTER_HINTS[field.name])
        for field in dataclasses.fields(HyperFormerConfig)
        if field.name != "tasks"
    ],
    namespace={
        "__doc__": "The adapters: fields of HyperFormerConfig; None where a field is not given.",
        "_argument_group_name": "the method and its adapters",
    },
)

_GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "adapters": AdapterArguments,
    "training": HyperFormerTrainingArguments,
}


def _known_fields() -> dict[str, tuple[str, Any]]:
    """Every flat field -> (its group, its type). A name in two groups belongs to the first: only ``data_seed`` is."""
    known: dict[str, tuple[str, Any]] = {}
    for group, kind in _GROUPS.items():
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init:
                known.setdefault(field.name, (group, hints[field.name]))
    return known


KNOWN_FIELDS = _known_fields()
# True stands for the newest checkpoint, as for Trainer.train.
KNOWN_FIELDS["resume_from_checkpoint"] = ("training", str | bool | None)

#: Secrets, and what a start does rather than what a run is. They are not saved.
NOT_SAVED = frozenset(
    "token hub_token push_to_hub_token resume_from_checkpoint overwrite_output_dir overwrite_cache local_rank".split()
)

#: Training arguments that a saved run keeps when it is read on another machine only to be evaluated.
_FOR_EVALUATION = frozenset(
    "output_dir per_device_eval_batch_size seed predict_with_generate generation_max_length generation_num_beams"
    " generation_config temperature mixed_batches loss_reduction".split()
)


def checked_fields(flat: Mapping[str, Any], *, of_this_version: bool = True) -> dict[str, Any]:
    """Return flat fields of a whole configuration under today's names, each known and of its type.

    Raises:
        RunConfigError: a field is unknown or invalid. Unknown ones are kept where they are not ``of_this_version``,
            because another version's transformers may have written a saved run.
    """
    if not isinstance(flat, Mapping):
        raise RunConfigError(f"a run's arguments must be an object of fields, got {type(flat).__name__}")
    given = settled(today(flat, whole=True, quiet=not of_this_version, stacklevel=4))
    for name, value in given.items():
        if name in KNOWN_FIELDS:
            check_field(name, value, KNOWN_FIELDS[name][1])
        elif of_this_version:
            raise RunConfigError(f"unknown field {name!r}{_instead(name)}")
    return given


def _instead(name: str) -> str:
    if name in official_fields.RENAMED:
        return f"; it is now {official_fields.RENAMED[name]!r}"
    return did_you_mean(name, [*KNOWN_FIELDS, *OLDER_NAMES])


@dataclasses.dataclass
class RunArguments:
    """All arguments of a run.

    Args:
        model, data, adapters, training: the arguments, by group.
        given: the flat fields that were set explicitly, by a file or a flag.
        started_process_group: whether making ``training`` started torch's process group, as it does under torchrun;
            who runs it then ends the group.
    """

    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    adapters: Any = dataclasses.field(default_factory=AdapterArguments)
    training: HyperFormerTrainingArguments = dataclasses.field(default_factory=HyperFormerTrainingArguments)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    started_process_group: bool = dataclasses.field(default=False, compare=False)
    #: The flat fields that ``training`` was made of, and what it made of them.
    _fields: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _made: dict[str, Any] | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any], for_training: bool = True) -> RunArguments:
        """Build the arguments from flat fields: ours and transformers', the authors', or those of older releases.

        Args:
            flat: the fields. The last two kinds are translated, and a warning names each.
            for_training: also make the training arguments, which sets up devices and, under torchrun, the process
                group. False: the few that evaluation needs, whatever machine the run was trained on.

        Raises:
            RunConfigError: a field is unknown or invalid, or fields contradict each other.
        """
        given = checked_fields(flat, of_this_version=for_training)
        fields = with_rate(with_preset(given))
        if for_training:
            check_together(fields)
            if fields.get("do_predict") is False:
                warnings.warn("do_predict false is ignored: a run always ends with an evaluation", stacklevel=2)
        made = {
            group: {name: value for name, value in fields.items() if KNOWN_FIELDS.get(name, ("",))[0] == group}
            for group in _GROUPS
        }
        if not for_training:
            made["training"] = {n: v for n, v in made["training"].items() if n in _FOR_EVALUATION}
        before = dist.is_initialized()
        built = cls(
            ModelArguments(**made["model"]),
            DataArguments(**made["data"]),
            AdapterArguments(**made["adapters"]),
            _make_training(made["training"]),
            given,
        )
        if for_training and built.adapters.task_to_embeddings is None:
            built.hyperformer_config(built.data.tasks or ["task"])
        built.started_process_group = dist.is_initialized() and not before
        built._fields, built._made = fields, _values(built.training)
        return built

    @classmethod
    def from_args(cls, argv: Sequence[str] | None = None) -> RunArguments:
        """Parse the flags of ``hyperformer-fast train``, which may begin or end in a JSON or YAML file."""
        from .parser import arguments_of  # it reads the dataclasses above

        return arguments_of(argv)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat fields that were set or differ from the defaults, as plain JSON types, without secrets."""
        flat: dict[str, Any] = {}
        for group in ("model", "data", "adapters"):
            for field in dataclasses.fields(_GROUPS[group]):
                value = getattr(getattr(self, group), field.name)
                if value != field.default or field.name in self._fields:
                    flat[field.name] = value
        made = _values(HyperFormerTrainingArguments()) if self._made is None else self._made
        for name, value in _values(self.training).items():
            if value != made[name]:
                flat[name] = _plain(value)
            elif name in self._fields and KNOWN_FIELDS[name][0] == "training":
                flat[name] = _plain(self._fields[name])
        return {name: copy.deepcopy(value) for name, value in flat.items() if name not in NOT_SAVED}

    def hyperformer_config(self, tasks: Sequence[str]) -> HyperFormerConfig:
        """Return the HyperFormerConfig for these tasks. Raises RunConfigError if the fields contradict each other."""
        fields = {name: value for name, value in vars(self.adapters).items() if value is not None}
        try:
            return HyperFormerConfig(**{**fields, "tasks": list(tasks)})
        except (ValueError, TypeError) as error:
            raise RunConfigError(str(error)) from error

    @property
    def adds_prefix(self) -> bool:
        """Whether sources begin with the task's name, as in the authors' code for full fine-tuning alone."""
        return self.adapters.variant == "finetuning" if self.data.add_prefix is None else self.data.add_prefix

    @property
    def selects(self) -> bool:
        """Whether evaluations on validation choose the weights: the best checkpoint's, or those of an early stop."""
        return bool(self.training.load_best_model_at_end or self.training.early_stopping_patience)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the Trainer's callbacks that arguments ask for: early stopping."""
        patience = self.training.early_stopping_patience
        if patience is None:
            return []
        return [EarlyStoppingCallback(patience, self.training.early_stopping_threshold)]

    def located(self) -> RunArguments:
        """Return a copy with absolute paths, which does not depend on the working directory."""
        here = copy.copy(self)
        here.model, here.data, here.training = copy.copy(self.model), copy.copy(self.data), copy.copy(self.training)
        for group, name in (
            (here.model, "model_name_or_path"),
            (here.model, "init_from"),
            (here.model, "tokenizer_name"),
        ):
            value = getattr(group, name)
            if value is not None and os.path.exists(value):
                setattr(group, name, os.path.abspath(value))
        for name in ("data_dir", "task_file"):
            value = getattr(here.data, name)
            if value is not None and not value.startswith("hub:"):
                setattr(here.data, name, os.path.abspath(value))
        decoding = self.training.generation_config
        if isinstance(decoding, (str, os.PathLike)) and os.path.exists(decoding):
            here.training.generation_config = os.path.abspath(decoding)
        here.training.output_dir = os.path.abspath(str(self.training.output_dir))
        return here


def _make_training(fields: Mapping[str, Any]) -> HyperFormerTrainingArguments:
    with refusals_named():
        return HyperFormerTrainingArguments(**fields)


def _values(training: HyperFormerTrainingArguments) -> dict[str, Any]:
    return {f.name: copy.copy(getattr(training, f.name)) for f in dataclasses.fields(training) if f.init}


def _plain(value: Any) -> Any:
    """Return an argument of transformers as plain JSON types."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    return json.loads(json.dumps(value, default=str))
