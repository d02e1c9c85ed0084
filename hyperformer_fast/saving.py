"""What transformers calls saving and loading: files of a model, state dicts, the Hub, and the model card."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import AutoConfig, PretrainedConfig

from . import embedding_mark, hub, model_card, parameters, pretrained
from .adapter_table import TaskNumbers
from .checkpoint import DESCRIPTION, MODEL_TYPE, CheckpointError, CheckpointFile, LoadedCheckpoint
from .config import HyperFormerConfig
from .delegate import T5Delegate
from .fusion.pieces import Fuse
from .hypernetwork import TaskEmbeddings
from .sharding import is_fsdp2, spread, whole_state
from .sites import find_sites
from .t5 import Snapshot, tie, trained_names
from .task_order import TaskOrder
from .threads import Threads
from .tiny import name_of

if TYPE_CHECKING:
    from .parameters import ParameterCount

_Model = TypeVar("_Model", bound="SavedModel")

#: What other threads' forwards must not meet halfway.
_LOAD = "load weights into this model"


class _ConfigFile(PretrainedConfig):
    """What transformers makes of our ``config.json``: AutoTokenizer reads it, wherever it reads a tokenizer."""

    model_type = MODEL_TYPE


AutoConfig.register(MODEL_TYPE, _ConfigFile, exist_ok=True)


class SavedModel(T5Delegate):
    """The part of a model that writes its trained tensors to files, and reads them again."""

    # transformers evaluates these annotations when a class is derived: their names must exist at run time.
    hyperformer_config: HyperFormerConfig
    task_embeddings: TaskEmbeddings | TaskNumbers
    hypernetworks: nn.ModuleDict
    #: Task -> metric -> value, for the model card that :meth:`save_pretrained` writes.
    card_metrics: Mapping[str, Mapping[str, float]] | None
    _snapshot: Snapshot
    _tied: list[list[str]]
    _threads: Threads
    _task_order: TaskOrder

    if TYPE_CHECKING:  # HyperFormerModel's

        def parameter_count(self) -> ParameterCount: ...

        def unload(self) -> nn.Module: ...

    def save_pretrained(  # type: ignore[override]  # transformers 4.57 and 5 differ in it
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save all that is trained: hypernetworks, embeddings, and the T5's parameters that the configuration trains.

        ``model.safetensors`` holds it under its names in :meth:`state_dict`, with a description of the configuration
        and the T5; ``config.json`` is a copy of the description, ``README.md`` a model card (an edited one, or somebody
        else's, is left alone). An old checkpoint there is replaced in one step, other files are left alone.

        Args:
            save_directory: where to save; created if necessary.
            is_main_process: False: do nothing, because another process saves.
            state_dict: the model's whole state dict, where the parameters are spread over processes. An empty one, as
                the Trainer passes if DeepSpeed keeps the weights to itself, saves nothing. None: after FSDP2's
                ``fully_shard`` the processes, all of which must call this, gather it themselves.
            push_to_hub: also upload these files, to the repository ``repo_id``.
            safe_serialization: True; other formats than safetensors are not written.
            kwargs: with ``push_to_hub``: ``repo_id`` (default: the directory's name) and the keyword arguments of
                :meth:`push_to_hub`. Those of transformers' method that have no meaning here are ignored
                (``max_shard_size``, ``variant``).

        Raises:
            OSError: the directory cannot be written.
            ValueError: a T5 parameter is trained that the configuration does not train: the checkpoint would lack it;
                a value is not finite; ``state_dict`` lacks a tensor; or the directory is the T5's own.
        """
        if not safe_serialization:
            raise ValueError("a HyperFormerModel is saved as safetensors only: leave safe_serialization at True")
        if state_dict is None and is_fsdp2(self):
            state_dict = whole_state(self)
        if not is_main_process or (state_dict is not None and not state_dict):
            return
        extra = self._snapshot.trained_beyond(self._base)
        if extra:
            raise ValueError(
                f"{extra[0]} (and {len(extra) - 1} more) of the T5 has requires_grad, but the configuration trains no "
                "such parameter, so the checkpoint would lack it: freeze it, or see unfreeze_layer_norms and "
                "unfreeze_lm_head"
            )
        with self._task_order.lock:  # tasks may come and go in other threads
            tensors, config = self._trained_tensors(), self.hyperformer_config
        if state_dict is not None:
            tensors = {name: self._value_in(state_dict, name) for name in tensors}
        weights = pretrained.frozen_in(state_dict, self._base, self._snapshot.trained)
        pretrained.save(save_directory, tensors, config, self._base, weights)
        self.create_or_update_model_card(save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or Path(save_directory).absolute().name
            hub.push_folder(save_directory, hub.MODEL_FILES, repo_id, **hub.push_arguments(kwargs))

    def push_to_hub(  # type: ignore[override]  # transformers 4.57 and 5 differ in it
        self, repo_id: str, *, tags: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Upload what :meth:`save_pretrained` writes to a repository on the Hub, which is created if necessary.

        Args:
            repo_id: its id; your account's name before the slash may be left out.
            tags: further tags for the model card.
            kwargs: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision`` and ``create_pr``,
                as everywhere in transformers.

        Returns:
            The commit.
        """
        options = hub.push_arguments(kwargs)
        with tempfile.TemporaryDirectory() as folder:
            present = hub.remote_card(repo_id, options.get("token"), options.get("revision"))
            if present is not None:
                Path(folder, model_card.NAME).write_text(present, encoding="utf-8")
            self.save_pretrained(folder)
            self.create_or_update_model_card(folder, tags)
            return hub.push_folder(folder, hub.MODEL_FILES, repo_id, **options)

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike[str], tags: Sequence[str] | None = None
    ) -> None:
        """Write ``README.md``: tasks, metrics (``card_metrics``), trained parameters, how to load.

        A README.md that this method did not write, or that was edited since, is left alone.
        """
        count = self.parameter_count()
        if not count.trained:  # frozen to be used: the card says what was trained before
            count = parameters.by_configuration(self.hyperformer_config, self._trained_tensors(), count.t5_total)
        model_card.write(
            output_dir,
            self.hyperformer_config,
            count,
            name_of(self._base),
            self.card_metrics,
            [*(self.model_tags or ()), *(tags or ())],
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers' has more arguments, which go to the T5 here
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | nn.Module | None = None,
        t5: nn.Module | str | os.PathLike[str] | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        fuse: Fuse = "auto",
        **kwargs: Any,
    ) -> _Model:
        """A model with the configuration and weights of a checkpoint. On any error a given T5 stays as it was.

        Args:
            pretrained_model_name_or_path: the folder of the checkpoint, or its repository's id on the Hub.
            t5: the T5 that it was trained on. None: load it from where it came from at the time, in the same dtype.
            directory: deprecated name of the first argument.
            fuse: what of the T5 is fused, as in :class:`HyperFormerModel`.
            kwargs: ``revision`` and ``subfolder`` of the checkpoint; ``cache_dir``, ``force_download``,
                ``local_files_only``, ``proxies`` and ``token`` for its files and the T5's; all others (``dtype``,
                ``device_map``, ``quantization_config`` ...) are for the T5's ``from_pretrained``.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: (a ValueError) it is broken, was trained on another T5, or its T5 cannot be loaded.
            OSError: the Hub cannot be reached, or has no such repository.
        """
        source = pretrained_model_name_or_path
        if isinstance(source, nn.Module) or directory is not None:
            warnings.warn(
                "HyperFormerModel.from_pretrained(t5, directory) is now from_pretrained(directory, t5=t5)",
                DeprecationWarning,
                stacklevel=2,
            )
            source, t5 = (directory or t5), source or t5
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"from_pretrained needs the folder or the Hub id of a checkpoint, got {source!r}")
        of_files, of_t5 = hub.split(kwargs)
        if t5 is not None and not isinstance(t5, nn.Module):
            raise TypeError(f"t5 must be a T5, got {t5!r}")
        if t5 is not None:
            unknown = sorted(kwargs.keys() - set(hub.HUB_ARGUMENTS))
            if unknown:
                raise TypeError(f"{unknown[0]} is for loading the T5, which is given: load it so, or leave out t5")
            find_sites(t5)
        folder = hub.find_checkpoint(source, **of_files)
        file = CheckpointFile(folder)
        if t5 is None:
            t5 = hub.load_t5(file.description.get("base_model"), source, **of_t5)
        return cls._around(t5, pretrained.described(file, folder, t5), fuse)

    @classmethod
    def _around(cls: type[_Model], t5: nn.Module, checkpoint: pretrained.Checkpoint, fuse: Fuse = "auto") -> _Model:
        """A model around ``t5`` with a checkpoint's configuration and weights."""
        try:
            trained = trained_names(t5, checkpoint.config)
            shapes = pretrained.shapes_of(checkpoint.config, t5, trained)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.directory}: config: {error}") from error
        checkpoint.expect(shapes, t5, trained)
        model = cls(t5, checkpoint.config, fuse)  # type: ignore[call-arg]  # HyperFormerModel takes them
        try:
            model._load(checkpoint)
        except BaseException:
            model.unload()
            raise
        return model

    def load_weights(self, directory: str | Path) -> None:
        """Load a checkpoint of this very configuration and T5 into this model: all of it, or, on an error, nothing.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: naming the first difference, and both sides of it.
        """
        checkpoint = pretrained.read(directory, self._base)
        self._expect(checkpoint)
        checkpoint.warn_of_old_order()
        self._load(checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, as ``torch.nn.Module`` does, or the tensors of a checkpoint, as the Trainer does.

        A checkpoint's are checked as :meth:`load_weights` checks them, and loaded all or none. They lack the T5's
        frozen weights, which are verified instead, so that no key counts as missing; ``assign`` is not read.

        A state dict of a model that reads its embeddings in another way (``normalize_embeddings``), and would silently
        compute something else here, is refused too; with ``strict=False`` it is a warning.

        Raises:
            CheckpointError: the checkpoint is broken, or of another configuration or T5; the state dict is of a model
                with other ``normalize_embeddings``; or, with ``strict=False``, nothing in it belongs to this model.
        """
        if DESCRIPTION in state_dict:
            file = LoadedCheckpoint(state_dict)
            checkpoint = pretrained.described(file, file.path, self._base)
            self._expect(checkpoint)
            self._load(checkpoint)
            return _IncompatibleKeys([], [])
        if not strict and state_dict and not state_dict.keys() & self._trained_tensors().keys():
            raise CheckpointError(
                f"none of the {len(state_dict)} tensors ({next(iter(state_dict))} for one) is one that this model "
                "trains: this is no checkpoint of a HyperFormerModel"
            )
        reason = embedding_mark.read_otherwise(self, state_dict) if strict else None
        if reason is not None:
            raise CheckpointError(f"{reason}. Nothing was loaded")
        with self._threads.alone(_LOAD), self._task_order.lock:
            loaded = super().load_state_dict(state_dict, strict, assign)
            if assign:
                # torch makes a parameter of each name, and a head that is tied would be trained apart, and not saved.
                tie(self._base, self._tied)
        return loaded

    def _expect(self, checkpoint: pretrained.Checkpoint) -> None:
        checkpoint.expect_config(self.hyperformer_config)
        shapes = {name: target.shape for name, target in self._trained_tensors().items()}
        checkpoint.expect(shapes, self._base, self._snapshot.trained)

    def _value_in(self, state_dict: Mapping[str, Tensor], name: str) -> Tensor:
        """A trained tensor's value in a whole state dict, where a tied one may have the name of another."""
        group = next((group for group in self._tied if name.removeprefix("t5.") in group), ())
        names = [name, *(f"t5.{other}" for other in group)] if name.startswith("t5.") else [name]
        found = next((state_dict[each] for each in names if each in state_dict), None)
        if found is None:
            raise ValueError(
                f"the state dict lacks {name}, which this model trains: nothing was saved (it has {len(state_dict)} "
                f"tensors, {next(iter(state_dict))} for one)"
            )
        return found

    @torch.no_grad()
    def _load(self, checkpoint: pretrained.Checkpoint) -> None:
        with self._threads.alone(_LOAD), self._task_order.lock:
            targets = self._trained_tensors()
            values = checkpoint.values_for(targets)
            for name, target in targets.items():
                target.copy_(spread(values[name], target))

    def _trained_tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint under their names in it. They share memory with the parameters."""
        parts = {"task_embeddings": self.task_embeddings, "hypernetworks": self.hypernetworks}
        ours = {f"{part}.{name}": p.detach() for part, module in parts.items() for name, p in module.named_parameters()}
        t5 = self._snapshot.trained_parameters(self._base)
        return ours | {f"t5.{name}": p.detach() for name, p in t5.items()}
