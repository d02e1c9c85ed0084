"""One task as a small file: what belongs to it alone, and what it belongs to.

A task of a hypernetwork is its embedding. The file is safetensors, with a description in its header: the task's name,
the SHA-256 of the hypernetworks that make adapters of the embedding, and the fingerprint of the T5 in which those
adapters sit. Both must be those of the model that takes the task in, because an embedding means nothing to others.
In variant ``"adapters"`` the file holds the task's adapters.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import __version__, fingerprint
from .atomic import explain_unwritable, write_file
from .checkpoint import DIGEST, CheckpointError, digest_of, expect_digest, parsed_description
from .config import HyperFormerConfig
from .pretrained import computation_of
from .task_changes import expect_changeable, expect_whole, insert, of_tasks, own_tensors
from .tiny import name_of

if TYPE_CHECKING:
    from .model import HyperFormerModel

FORMAT_VERSION = 1

_HEADER = "hyperformer_task"  # the key in the safetensors header that only these files have

#: Fields of a configuration that decide nothing but which tasks there are, how weights start and what is trained.
_NOT_COMPUTED = frozenset(
    """tasks task_to_embeddings freeze_model_but_task_embeddings unfreeze_layer_norms unfreeze_lm_head recipe
    init_weights zero_delta unique_hyper_net efficient_unique_hyper_net""".split()
)


@dataclasses.dataclass(frozen=True)
class _Belongs:
    """What a task belongs to.

    Args:
        config: the fields of the configuration that decide what is computed.
        hypernetworks: the SHA-256 of these fields and of all weights that tasks share, but for the T5's.
        dtype: the dtype of these weights.
        weights: the T5's weights, trained ones included.
        t5: what a file says of the T5.
    """

    config: dict[str, Any]
    hypernetworks: str
    dtype: str
    weights: fingerprint.Weights
    t5: dict[str, Any]

    @classmethod
    def of(cls, model: HyperFormerModel) -> _Belongs:
        config = _computed(model.hyperformer_config)
        parts = {"task_embeddings": model.task_embeddings, "hypernetworks": model.hypernetworks}
        with model._task_order.lock:
            own = {id(parameter) for group in of_tasks(model).values() for parameter in group.values()}
            found = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        shared = {name: p.detach().cpu().contiguous() for name, p in found.items() if id(p) not in own}
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in shared.values()}
        weights = fingerprint.frozen(model._base, ())
        fields: Any = fingerprint.config_of(model._base).to_dict()
        t5 = {
            "name_or_path": name_of(model._base),
            "computation": computation_of(fields),
            "digests": fingerprint.summary(weights),
        }
        return cls(config, digest_of(shared, config), ", ".join(sorted(dtypes)), weights, t5)

    def expect(self, description: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError unless a file's task belongs to the same. Warn where its T5 cannot be compared."""
        theirs = description["hypernetworks"]
        both = f"(SHA-256 {theirs} in the file, {self.hypernetworks} in this model)"
        config = description["config"]
        for field, ours in self.config.items():
            if config.get(field) != ours:
                raise CheckpointError(
                    f"{path} is a task of other hypernetworks {both}: {field} is {config.get(field)!r} in the file, "
                    f"{ours!r} in this model"
                )
        if theirs != self.hypernetworks:
            why = f": they are in {description['dtype']} there, in {self.dtype} here; import tasks before a cast"
            raise CheckpointError(
                f"{path} is a task of other hypernetworks {both}{why if description['dtype'] != self.dtype else ''}. "
                "An embedding means nothing to weights that were trained apart from it: take the model that it was "
                "exported from"
            )
        said = description["t5"]
        ours = self.t5["computation"]
        other = next((f for f, value in said["computation"].items() if f in ours and ours[f] != value), None)
        differs = other is not None or fingerprint.differs_from_summary(self.weights, said["digests"])
        if differs:
            digests = " and ".join(_shown(each) for each in (said["digests"], self.t5["digests"]))
            raise CheckpointError(
                f"{path} is a task of another T5, {said['name_or_path'] or 'one without a name'!s}: "
                + (f"{other} differs" if other is not None else f"the digests of all weights are {digests}")
            )
        if differs is None:
            warnings.warn(
                f"{path}: the T5's weights are quantised, here or where the task was exported, or have precisions that "
                "cannot be compared: make sure that this is the T5 it was trained on",
                stacklevel=4,
            )


def _computed(config: HyperFormerConfig) -> dict[str, Any]:
    return {field: value for field, value in config.to_dict().items() if field not in _NOT_COMPUTED}


def _shown(digests: Mapping[str, str]) -> str:
    return next((f"{digest} in {precision}" for precision, digest in digests.items()), "unknown")


def export_task(model: HyperFormerModel, task: str, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write one task to a file; see ``HyperFormerModel.export_task``."""
    expect_whole(model)
    with model._task_order.lock:
        tensors = {name: value.cpu().contiguous() for name, value in own_tensors(model, task).items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"the {name} of {task!r} has values that are not finite: nothing was written")
    belongs = _Belongs.of(model)
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "task": task,
        "hypernetworks": belongs.hypernetworks,
        "dtype": belongs.dtype,
        "config": belongs.config,
        "t5": belongs.t5,
    }
    description = json.loads(json.dumps(description))
    description[DIGEST] = digest_of(tensors, description)
    content = save(tensors, metadata={"format": "pt", _HEADER: json.dumps(description)})
    with explain_unwritable(Path(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_file(Path(path), replace=overwrite) as partial:
            partial.write_bytes(content)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: give another name, or overwrite=True to replace it") from None


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """The content of a file that :func:`export_task` wrote.

    Attributes:
        path: the file.
        task: the task's name.
        hypernetworks: the SHA-256 of the hypernetworks that it belongs to.
        tensors: what belongs to the task alone, on the CPU.
        description: all that the header says.
    """

    path: Path
    task: str
    hypernetworks: str
    tensors: dict[str, Tensor]
    description: dict[str, Any]


def read_task_file(path: str | os.PathLike[str]) -> TaskFile:
    """Read a file that ``export_task`` wrote, and check that it is whole.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        CheckpointError: (a ValueError) it is broken, of another format version, or no file of a task.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the file that export_task wrote")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if _HEADER not in header:
                ours = ": it is the checkpoint of a whole model" if "hyperformer" in header else ""
                raise CheckpointError(f"{path} is a safetensors file, but not one that export_task wrote{ours}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    description = parsed_description(header[_HEADER], f"{path}: the header's {_HEADER!r}")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}; this library reads {FORMAT_VERSION}")
    if DIGEST not in description:
        raise CheckpointError(f"{path}: the header lacks {DIGEST!r}, the digest of the file")
    expect_digest(str(path), tensors, description)
    _expect_fields(path, description)
    return TaskFile(path, description["task"], description["hypernetworks"], tensors, description)


def _expect_fields(path: Path, description: Mapping[str, Any]) -> None:
    fields = {"task": str, "hypernetworks": str, "dtype": str, "config": dict, "t5": dict}
    of_t5 = {"name_or_path": str, "computation": dict, "digests": dict}
    for where, of, kinds in (("", description, fields), ("t5.", description.get("t5", {}), of_t5)):
        for field, kind in kinds.items():
            if not isinstance(of.get(field), kind):
                raise CheckpointError(f"{path}: {where}{field} must be a {kind.__name__}, got {of.get(field)!r}")


def import_tasks(
    model: HyperFormerModel, paths: Sequence[str | os.PathLike[str]], names: Sequence[str | None] | None = None
) -> list[str]:
    """Take in the tasks of some files, all of them or, on an error, none; see ``HyperFormerModel.import_task``.

    The model is compared once for all files, which saves time where there are many.

    Args:
        model: the model.
        paths: the files.
        names: the names that the tasks get, None for those in the files.

    Returns:
        The tasks' names.
    """
    files = [read_task_file(path) for path in paths]
    expect_changeable(model)
    if not of_tasks(model):
        own_tensors(model, model.hyperformer_config.tasks[0])  # which says why there is nothing to import
    belongs = _Belongs.of(model)
    for file in files:
        belongs.expect(file.description, file.path)
    with model._task_order.lock:  # the rest is quick, and forwards wait
        config, found = model.hyperformer_config, []
        for file, name in zip(files, names or [None] * len(files), strict=True):
            _expect_tensors(model, file)
            called = file.task if name is None else name
            try:
                config = config.with_task(called)
            except (ValueError, TypeError) as error:
                cure = "; import_task(path, name=...) gives it another name" if name is None else ""
                raise type(error)(f"{file.path}: {error}{cure}") from error
            found.append(called)
        for file, called in zip(files, found, strict=True):
            insert(model, called, file.tensors)
    return found


def _expect_tensors(model: HyperFormerModel, file: TaskFile) -> None:
    wanted = {name: next(iter(group.values())) for name, group in of_tasks(model).items()}
    if file.tensors.keys() != wanted.keys():
        raise CheckpointError(f"{file.path} has {', '.join(sorted(file.tensors))}, and not {', '.join(sorted(wanted))}")
    for name, like in wanted.items():
        value = file.tensors[name]
        for what, theirs, ours in (("shape", list(value.shape), list(like.shape)), ("dtype", value.dtype, like.dtype)):
            if theirs != ours:
                raise CheckpointError(f"{file.path}: {name} has {what} {theirs} in the file, {ours} in this model")
        if not value.isfinite().all():
            where = value[~value.isfinite()][0].item()
            raise CheckpointError(f"{file.path}: {name} has the value {where}, which is not finite")
