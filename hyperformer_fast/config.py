"""HyperFormerConfig: the validated, JSON-serialisable description of a model, under the authors' field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import recipes
from .activations import canonical_activation
from .config_checks import check_sizes, check_tasks
from .config_files import ConfigFiles
from .variants import HYPERNETWORK_VARIANTS, VARIANTS, check_switches, resolve, variant_of_flags

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["VARIANTS", "HyperFormerConfig", "variant_of_flags"]


@dataclasses.dataclass(kw_only=True, eq=True)
class HyperFormerConfig(ConfigFiles):
    """Configuration of the hypernetworks and adapters of one model.

    The defaults are those of the authors' ``hyperformer++.json``, not those of their ``MetaAdapterConfig`` class (which
    has swish, reduction factor 16 and 512-d task embeddings). Only the recipe is ours: ``recipe="authors"`` is theirs.

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
        recipe: how weights start and how fast each part learns: it sets the next three fields where they are None, and
            the rule of learning rates. ``"default"`` is this library's own, ``"authors"`` is what the authors' code
            does.
        init_weights: how weights are drawn. ``"authors"``: a normal distribution with standard deviation 1e-2 for all.
            ``"hyperfan_in"``, ``"hyperfan_out"``: so that generated weights have the variance of a plain adapter's that
            preserves that of activations (of gradients), with an up-projection of a tenth of its size. None: as the
            recipe says.
        zero_delta: start with adapters that return their input, to the last bit: the last factor of what they add (the
            norm after them, else their up-projection) is zero. None: as the recipe says.
        normalize_embeddings: scale the embeddings of task, layer and position, each by itself, to a root mean square of
            1 before anything reads them. None: as the recipe says.

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
    recipe: str = dataclasses.field(
        default="default",
        metadata={
            "help": (
                "how weights start and how fast each part learns: it sets the next three fields where they are None, "
                'and the rule of learning rates. "default" is this library\'s own, "authors" is what the authors\' '
                "code does."
            )
        },
    )
    init_weights: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": (
                'how weights are drawn. "authors": a normal distribution with standard deviation 1e-2 for all. '
                '"hyperfan_in", "hyperfan_out": so that generated weights have the variance of a plain adapter\'s that '
                "preserves that of activations (of gradients), with an up-projection of a tenth of its size. None: as "
                "the recipe says."
            )
        },
    )
    zero_delta: bool | None = dataclasses.field(
        default=None,
        metadata={
            "help": (
                "start with adapters that return their input, to the last bit: the last factor of what they add (the "
                "norm after them, else their up-projection) is zero. None: as the recipe says."
            )
        },
    )
    normalize_embeddings: bool | None = dataclasses.field(
        default=None,
        metadata={
            "help": (
                "scale the embeddings of task, layer and position, each by itself, to a root mean square of 1 before "
                "anything reads them. None: as the recipe says."
            )
        },
    )

    def __post_init__(self) -> None:
        check_tasks(self)
        check_sizes(self)
        self.variant, self.unique_hyper_net, self.efficient_unique_hyper_net = resolve(
            self.variant, self.unique_hyper_net, self.efficient_unique_hyper_net
        )
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"{field.name} must be True or False, got {getattr(self, field.name)!r}")
        self.non_linearity = canonical_activation(self.non_linearity, field="non_linearity")
        recipes.settle(self)
        check_switches(self)
        shared = self.shares_generators
        if self.train_task_embeddings and shared and self.projected_task_embedding_dim != self.task_embedding_dim:
            raise ValueError(
                f"train_task_embeddings with variant {self.variant!r} needs projected_task_embedding_dim equal to "
                f"task_embedding_dim (a projected task embedding stands beside layer embeddings of that width), "
                f"got {self.projected_task_embedding_dim} and {self.task_embedding_dim}"
            )

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

    def without_task(self, name: str) -> HyperFormerConfig:
        """Return a copy without the task ``name``. ValueError if there is no such task, or no other one."""
        place = self.task_id(name)
        if len(self.tasks) == 1:
            raise ValueError(f"task {name!r} is the only one, and a model has at least one: add another one first")
        tasks, mapping = list(self.tasks), self.task_to_embeddings
        del tasks[place]
        if mapping is not None:
            mapping = {task: embedding for task, embedding in mapping.items() if task != name}
        return self.replace(tasks=tasks, task_to_embeddings=mapping)

    def with_task_renamed(self, old: str, new: str) -> HyperFormerConfig:
        """Return a copy in which the task ``old`` is called ``new``, and so is an embedding ``old`` that only it uses.

        Raises:
            ValueError: there is no such task, or the new name is taken.
        """
        place = self.task_id(old)
        if new in self.tasks or new in self.embedding_names:
            raise ValueError(f"task {new!r} exists already: choose a name other than {', '.join(self.tasks)}")
        tasks, mapping = list(self.tasks), self.task_to_embeddings
        tasks[place] = new
        if mapping is not None:
            alone = mapping[old] == old and list(mapping.values()).count(old) == 1
            mapping = {new if task == old else task: embedding for task, embedding in mapping.items()}
            mapping |= {new: new} if alone else {}
        return self.replace(tasks=tasks, task_to_embeddings=mapping)

    def task_ids(self, tasks: Sequence[str]) -> list[int]:
        """Return the index of each of ``tasks``. Raises ValueError for an unknown task."""
        if len(tasks) < 8:
            return [self.task_id(task) for task in tasks]
        places = {task: place for place, task in enumerate(self.tasks)}
        return [places[task] if task in places else self.task_id(task) for task in tasks]

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
        """Return a validated copy with ``changes``.

        Changing ``variant`` also resets the two flags that encode it, and changing ``recipe`` the fields that it sets.
        """
        fields = self.to_dict()
        if "variant" in changes:
            fields["unique_hyper_net"] = fields["efficient_unique_hyper_net"] = None
        elif {"unique_hyper_net", "efficient_unique_hyper_net"} & changes.keys():
            fields["variant"] = None
        if "recipe" in changes:
            fields |= dict.fromkeys(recipes.OF_THE_CONFIG)
        return type(self).from_dict({**fields, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types, copied so that changing them does not change this instance."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build a configuration from what :meth:`to_dict` returns. Raises ValueError for unknown or missing keys.

        Without ``recipe`` the fields are those of a version that had no recipes and trained as the authors do: the
        configuration is of recipe ``"authors"``.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"a configuration must be a mapping of field names to values, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
        if "tasks" not in fields:
            raise ValueError("the configuration lacks the field 'tasks'")
        return cls(**{"recipe": recipes.BEFORE_RECIPES, **fields})
