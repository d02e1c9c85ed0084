"""HyperFormerConfig: the validated, JSON-serialisable description of a model, under the authors' field names."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import official_fields
from .activations import canonical_activation
from .checkpoint import CONFIG_NAME, MODEL_TYPE, OLD_CONFIG_NAME
from .json_files import read_object
from .variants import HYPERNETWORK_VARIANTS, VARIANTS, check_switches, resolve, variant_of_flags

__all__ = ["VARIANTS", "HyperFormerConfig", "variant_of_flags"]


@dataclasses.dataclass(kw_only=True, eq=True)
class HyperFormerConfig:
    """Configuration of the hypernetworks and adapters of one model.

    The defaults are those of the authors' ``hyperformer++.json``, not those of their ``MetaAdapterConfig`` class (which
    has swish, reduction factor 16 and 512-d task embeddings).

    Args:
        tasks: names of the tasks, in the order of their indices. Required, not empty, unique.
        variant: the method. In the first three the adapters are generated; they differ in what the adapters of a stack
            share: ``"hyperformer++"`` one set of generators for all of them, ``"hyperformer-shared"`` one for the
            feed-forward and one for the self-attention adapters, ``"hyperformer"`` none (a set per block and position;
            the paper's HyperFormer). ``"adapters"``: each task learns adapters of its own, and all tasks share their
            layer norms (the paper's Adapters-dagger; with one task its single-task Adapters). ``"finetuning"``: no
            adapters, the whole T5 is trained, and of the other fields only ``tasks`` is read. None: derived from the
            two flags below.
        task_embedding_dim: width of a task's own embedding (and of the layer and position embeddings).
        projected_task_embedding_dim: width k of the embedding that the generators read (64 in the paper).
        task_hidden_dim: hidden width of the network between the two (128 in the paper).
        reduction_factor: an adapter's bottleneck is ``b = d // reduction_factor``.
        non_linearity: ``gelu_new`` (tanh form), ``gelu`` (erf), ``relu``, ``silu`` (also under its official name
            ``swish``).
        add_layer_norm_before_adapter: normalise the adapter's input.
        add_layer_norm_after_adapter: normalise the adapter's output, before the skip is added.
        train_adapters_blocks: False leaves only the generated layer norms of the adapters: x + norm(x).
        conditional_layer_norm: generate the norms' parameters. False, in variant ``"hyperformer"``: all tasks share
            learned ones. The two shared variants always generate them, as in the authors' code, and warn of False;
            ``"adapters"`` never does.
        unique_hyper_net: the authors' flag for ``"hyperformer-shared"``.
        efficient_unique_hyper_net: the authors' flag for ``"hyperformer++"``; takes precedence over the other.
        unique_hyper_net_layer_norm: apply a layer norm (eps 1e-6) to the joint embedding. Variant ``"hyperformer"``
            ignores this field.
        train_task_embeddings: project the task embeddings through a network of their own before anything else reads
            them.
        task_projector: False removes every network between the embeddings and the generators. Embeddings then have the
            generators' width k themselves, and the two shared variants add those of task, layer and position up.
        task_to_embeddings: task -> name of the embedding (in variant ``"adapters"``: of the adapters) it uses; tasks
            may share one. None: each task has its own.
        freeze_model_but_task_embeddings: train the task embeddings alone. What else the configuration would train keeps
            its values, and is saved with them.
        unfreeze_layer_norms: train T5's own layer norms.
        unfreeze_lm_head: train T5's output head.

    Raises:
        ValueError, TypeError: naming the field, its value and what is allowed.
    """

    # Each help text stands in the docstring too, for editors; a test compares the two.
    tasks: list[str] = dataclasses.field(
        metadata={"help": "names of the tasks, in the order of their indices. Required, not empty, unique."}
    )
    variant: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": (
                "the method. In the first three the adapters are generated; they differ in what the adapters of a "
                'stack share: "hyperformer++" one set of generators for all of them, "hyperformer-shared" one for the '
                'feed-forward and one for the self-attention adapters, "hyperformer" none (a set per block and '
                "position; the paper's HyperFormer). "
                '"adapters": each task learns adapters of its own, and all tasks share their '
                "layer norms (the paper's Adapters-dagger; with one task its single-task Adapters). "
                '"finetuning": no adapters, the whole T5 is trained, and of the other fields only tasks is read. '
                "None: derived from the two flags below."
            )
        },
    )
    task_embedding_dim: int = dataclasses.field(
        default=64, metadata={"help": "width of a task's own embedding (and of the layer and position embeddings)."}
    )
    projected_task_embedding_dim: int = dataclasses.field(
        default=64, metadata={"help": "width k of the embedding that the generators read (64 in the paper)."}
    )
    task_hidden_dim: int = dataclasses.field(
        default=128, metadata={"help": "hidden width of the network between the two (128 in the paper)."}
    )
    reduction_factor: int = dataclasses.field(
        default=32, metadata={"help": "an adapter's bottleneck is b = d // reduction_factor."}
    )
    non_linearity: str = dataclasses.field(
        default="gelu_new",
        metadata={"help": "gelu_new (tanh form), gelu (erf), relu, silu (also under its official name swish)."},
    )
    add_layer_norm_before_adapter: bool = dataclasses.field(
        default=False, metadata={"help": "normalise the adapter's input."}
    )
    add_layer_norm_after_adapter: bool = dataclasses.field(
        default=True, metadata={"help": "normalise the adapter's output, before the skip is added."}
    )
    train_adapters_blocks: bool = dataclasses.field(
        default=True,
        metadata={"help": "False leaves only the generated layer norms of the adapters: x + norm(x)."},
    )
    conditional_layer_norm: bool = dataclasses.field(
        default=True,
        metadata={
            "help": (
                "generate the norms' parameters. "
                'False, in variant "hyperformer": all tasks share learned ones. '
                "The two shared variants always generate them, as in the authors' code, and warn of False; "
                '"adapters" never does.'
            )
        },
    )
    unique_hyper_net: bool | None = dataclasses.field(
        default=None, metadata={"help": 'the authors\' flag for "hyperformer-shared".'}
    )
    efficient_unique_hyper_net: bool | None = dataclasses.field(
        default=None, metadata={"help": 'the authors\' flag for "hyperformer++"; takes precedence over the other.'}
    )
    unique_hyper_net_layer_norm: bool = dataclasses.field(
        default=True,
        metadata={
            "help": 'apply a layer norm (eps 1e-6) to the joint embedding. Variant "hyperformer" ignores this field.'
        },
    )
    train_task_embeddings: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "project the task embeddings through a network of their own before anything else reads them."
        },
    )
    task_projector: bool = dataclasses.field(
        default=True,
        metadata={
            "help": (
                "False removes every network between the embeddings and the generators. Embeddings then have the "
                "generators' width k themselves, and the two shared variants add those of task, layer and position up."
            )
        },
    )
    task_to_embeddings: dict[str, str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": (
                'task -> name of the embedding (in variant "adapters": of the adapters) it uses; tasks may share one. '
                "None: each task has its own."
            )
        },
    )
    freeze_model_but_task_embeddings: bool = dataclasses.field(
        default=False,
        metadata={
            "help": (
                "train the task embeddings alone. What else the configuration would train keeps its values, and is "
                "saved with them."
            )
        },
    )
    unfreeze_layer_norms: bool = dataclasses.field(default=True, metadata={"help": "train T5's own layer norms."})
    unfreeze_lm_head: bool = dataclasses.field(default=False, metadata={"help": "train T5's output head."})

    def __post_init__(self) -> None:
        self._check_tasks()
        self._check_sizes()
        self.variant, self.unique_hyper_net, self.efficient_unique_hyper_net = resolve(
            self.variant, self.unique_hyper_net, self.efficient_unique_hyper_net
        )
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"{field.name} must be True or False, got {getattr(self, field.name)!r}")
        self.non_linearity = canonical_activation(self.non_linearity, field="non_linearity")
        check_switches(self)
        shared = self.shares_generators
        if self.train_task_embeddings and shared and self.projected_task_embedding_dim != self.task_embedding_dim:
            raise ValueError(
                f"train_task_embeddings with variant {self.variant!r} needs projected_task_embedding_dim equal to "
                f"task_embedding_dim (a projected task embedding stands beside layer embeddings of that width), "
                f"got {self.projected_task_embedding_dim} and {self.task_embedding_dim}"
            )

    def _check_tasks(self) -> None:
        if isinstance(self.tasks, str) or not isinstance(self.tasks, (list, tuple)):
            raise TypeError(f"tasks must be a list of names, got {self.tasks!r}")
        self.tasks = list(self.tasks)
        for task in self.tasks:
            _check_name("tasks", task)
        if not self.tasks:
            raise ValueError("tasks must name at least one task, got []")
        repeated = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"tasks must be unique, got {repeated} more than once")
        if self.task_to_embeddings is None:
            return
        if not isinstance(self.task_to_embeddings, Mapping):
            raise TypeError(
                f"task_to_embeddings must map task names to embedding names, got {self.task_to_embeddings!r}"
            )
        self.task_to_embeddings = dict(self.task_to_embeddings)
        missing = [task for task in self.tasks if task not in self.task_to_embeddings]
        unknown = [task for task in self.task_to_embeddings if task not in self.tasks]
        if missing or unknown:
            raise ValueError(
                f"task_to_embeddings must have exactly the tasks {self.tasks} as keys; "
                f"missing {missing}, unknown {unknown}"
            )
        for name in self.task_to_embeddings.values():
            _check_name("task_to_embeddings", name)

    def _check_sizes(self) -> None:
        for name in ("task_embedding_dim", "projected_task_embedding_dim", "task_hidden_dim", "reduction_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def has_hypernetworks(self) -> bool:
        """Whether the adapters are generated from task embeddings."""
        return self.variant in HYPERNETWORK_VARIANTS

    @property
    def shares_generators(self) -> bool:
        """Whether one generator serves several adapters, which it tells apart by layer (and position) embeddings."""
        return self.has_hypernetworks and self.variant != "hyperformer"

    @property
    def generates_norms(self) -> bool:
        """Whether norm parameters are generated, as they always are where generators are shared."""
        return self.has_hypernetworks and (self.conditional_layer_norm or self.shares_generators)

    @property
    def embedding_dim(self) -> int:
        """The width of a task's own embedding, and of the layer and position embeddings."""
        return self.task_embedding_dim if self.task_projector else self.projected_task_embedding_dim

    @property
    def embedding_names(self) -> list[str]:
        """Names of the task embeddings, in order of first use."""
        return list(dict.fromkeys(self.embedding_of(task) for task in self.tasks))

    def embedding_of(self, task: str) -> str:
        """Return the name of the embedding that ``task`` uses."""
        return task if self.task_to_embeddings is None else self.task_to_embeddings[task]

    def with_task(self, name: str, init_from: str | list[str] | None = None) -> HyperFormerConfig:
        """Return a copy with one more task, which has an embedding of its own.

        Args:
            name: the new task.
            init_from: the tasks that its weights are to start from; they are only checked here.

        Raises:
            ValueError: the name is taken, or ``init_from`` names an unknown task or is an empty list.
        """
        if name in self.tasks or name in self.embedding_names:
            raise ValueError(f"task {name!r} exists already: choose a name other than {', '.join(self.tasks)}")
        sources = [init_from] if isinstance(init_from, str) else init_from
        for source in sources or ():
            self.task_id(source)
        if sources is not None and not sources:
            raise ValueError("init_from must name at least one task, got []; None draws random weights")
        mapping = self.task_to_embeddings
        return self.replace(
            tasks=[*self.tasks, name], task_to_embeddings=None if mapping is None else {**mapping, name: name}
        )

    def task_id(self, task: str) -> int:
        """Return the index of ``task``, as ``task_index`` counts tasks. Raises ValueError for an unknown task."""
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}; this model has {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def bottleneck(self, d: int) -> int:
        """Return the bottleneck b of an adapter of width d. Raises ValueError if it would be 0."""
        b = d // self.reduction_factor
        if b < 1:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck at width d={d}: at most {d} is allowed"
            )
        return b

    def replace(self, **changes: Any) -> HyperFormerConfig:
        """Return a validated copy with ``changes``. Changing ``variant`` also resets the two flags that encode it."""
        fields = self.to_dict()
        if "variant" in changes:
            fields["unique_hyper_net"] = fields["efficient_unique_hyper_net"] = None
        elif {"unique_hyper_net", "efficient_unique_hyper_net"} & changes.keys():
            fields["variant"] = None
        return type(self).from_dict({**fields, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types, copied so that changing them does not change this instance."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HyperFormerConfig:
        """Build a configuration from what :meth:`to_dict` returns. Raises ValueError for unknown or missing keys."""
        if not isinstance(fields, Mapping):
            raise TypeError(f"a configuration must be a mapping of field names to values, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
        if "tasks" not in fields:
            raise ValueError("the configuration lacks the field 'tasks'")
        return cls(**fields)

    @classmethod
    def from_official(cls, fields: Mapping[str, Any] | str | os.PathLike[str], **changes: Any) -> HyperFormerConfig:
        """Build a configuration from the fields of the authors' configuration that describe the model.

        Absent fields have the authors' defaults, not ours; without either variant flag the variant is
        ``"hyperformer"``. A warning names the fields that are ignored, such as the training arguments in their JSON
        files.

        Args:
            fields: their configuration, or the path of their JSON file.
            changes: fields of HyperFormerConfig that override the translated ones.

        Raises:
            ValueError: the configuration is of another method (fine-tuning, plain adapters), or sets a field to a value
                that no variant here supports; the message names the field.
            TypeError: a value, or ``fields`` itself, has a wrong type.
            OSError: the file cannot be read.
        """
        path = None
        if isinstance(fields, (str, os.PathLike)):
            path = Path(fields)
            fields = read_object(path)
        try:
            ours = {field.name for field in dataclasses.fields(cls)} - {"variant"}
            translated = official_fields.translate(fields, ours)
            if "variant" in changes:
                translated["unique_hyper_net"] = translated["efficient_unique_hyper_net"] = None
            flags = (bool(translated[flag]) for flag in ("unique_hyper_net", "efficient_unique_hyper_net"))
            if changes.get("variant", variant_of_flags(*flags)) != "hyperformer":
                translated["conditional_layer_norm"] = True  # their code does so, whatever the field says
            return cls.from_dict({**translated, **changes})
        except (ValueError, TypeError) as error:
            if path is None:
                raise
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the configuration to ``config.json`` in a folder, which is created if necessary.

        Raises:
            ValueError: the folder has the configuration of another kind of model, which would be lost.
        """
        path = Path(save_directory, CONFIG_NAME)
        kind = read_object(path).get("model_type") if path.is_file() else MODEL_TYPE
        if kind != MODEL_TYPE:
            raise ValueError(f"{path} is the configuration of a {kind}: save to another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"model_type": MODEL_TYPE, "config": self.to_dict()}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub_arguments: Any
    ) -> HyperFormerConfig:
        """Read the configuration of a saved model or configuration.

        Args:
            pretrained_model_name_or_path: its folder, or its repository's id on the Hub.
            hub_arguments: ``revision``, ``token``, ``cache_dir`` and the like.

        Raises:
            ValueError: the file there holds no configuration of ours.
            OSError: there is no such file, or it cannot be read.
        """
        from .hub import find

        if os.path.isdir(pretrained_model_name_or_path):
            return cls.load(Path(pretrained_model_name_or_path, hub_arguments.get("subfolder") or ""))
        return cls.load(find(pretrained_model_name_or_path, CONFIG_NAME, OLD_CONFIG_NAME, **hub_arguments))

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HyperFormerConfig:
        """Read a configuration from JSON.

        Args:
            path: a file that :meth:`save` wrote, or the ``config.json`` of a saved model or its folder.

        Raises:
            ValueError: the file holds no configuration; the message names it and says what it seems to hold.
            OSError: the file cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            # Files of version 0.1.0 may lie beside a T5's own config.json.
            path /= OLD_CONFIG_NAME if (path / OLD_CONFIG_NAME).is_file() else CONFIG_NAME
        content = read_object(path)
        # A saved model's file has the configuration in its field "config", beside a description of the T5.
        wrapped = isinstance(content.get("config"), dict) and "tasks" not in content
        try:
            return cls.from_dict(content["config"] if wrapped else content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}{_what_else(content)}") from error


def _what_else(content: Mapping[str, Any]) -> str:
    """Say what a file that is no configuration seems to hold, as the end of an error message."""
    if "model_type" in content:
        return f" (the file is transformers' configuration of a {content['model_type']})"
    if "arguments" in content:
        return f" (the file describes a run; the configuration is in the {CONFIG_NAME} beside it)"
    if isinstance(content.get("hyperformer"), dict):
        return " (the file configures a run, as `hyperformer-fast train` takes it; its 'hyperformer' holds our fields)"
    if {"model_name_or_path", "train_adapters", "adapter_config_name"} & content.keys():
        return " (the file belongs to the authors' code: HyperFormerConfig.from_official reads it)"
    return ""


def _check_name(field: str, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{field}: a name must be a non-empty string, got {name!r}")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{field}: {name!r} contains half of a surrogate pair, which UTF-8 cannot encode")
