"""``HyperFormerModel.materialize``: one task as a plain T5 with ordinary adapters, without a hypernetwork."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..atomic import write_directory
from ..fingerprint import is_plain
from ..fusion import unfuse_t5
from ..norm_only import NormLayout
from ..sites import find_sites, remove_hooks
from ..t5 import tied_names
from . import plain_t5
from .folder import check_replaceable
from .weights import expect_whole, packed_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..layout import AdapterLayout
    from ..model import HyperFormerModel

#: The file by which a saved folder is known.
DESCRIPTION = "adapters.json"

#: What else is in it.
_WRITTEN = ("config.json", "generation_config.json", "weights.safetensors", "plain_t5.py")

#: The parts of an adapter's layout, as parameters of ``plain_t5.Adapter``.
_PARAMETERS = {
    "down_weight": "down.weight",
    "down_bias": "down.bias",
    "up_weight": "up.weight",
    "up_bias": "up.bias",
    "post_gamma": "norm_after.weight",
    "post_beta": "norm_after.bias",
    "pre_gamma": "norm_before.weight",
    "pre_beta": "norm_before.bias",
}


@dataclasses.dataclass(frozen=True)
class MaterializedTask:
    """One task of a model: a T5 of its own, and what it is made of."""

    task: str
    t5: PreTrainedModel  #: a copy in ``eval()``, not fused, with an ``Adapter`` module behind each site; nothing trains
    layout: AdapterLayout | None  #: of the adapters; None where the method has none (variant ``"finetuning"``)
    activation: str  #: of the adapters
    trained: tuple[str, ...]  #: names of the T5's own parameters that the model trained

    @property
    def adapters(self) -> dict[str, plain_t5.Adapter]:
        """The adapters by the names of the T5's modules that they follow."""
        modules: dict[str, Any] = plain_t5.adapted_modules(self.t5)
        return {path: module.adapter for path, module in modules.items() if hasattr(module, "adapter")}

    def save(self, folder: str | Path) -> None:
        """Write the T5, and a short Python file that loads it without this library, to ``folder``.

        ``plain_t5.py`` there has ``load(folder)``. The files appear in one step, and replace those of an earlier call.

        Raises:
            ValueError: the T5 is quantised, or has something in or around it (LoRA, say) that its class has not; there
                are no adapters.
            OSError: the folder cannot be written, or has files that no earlier call wrote.
        """
        if self.layout is None:
            raise ValueError(
                "variant 'finetuning' has no adapters, so that its T5 is a plain one: save it with "
                "materialize(task).t5.save_pretrained(folder)"
            )
        self._expect_loadable()
        check_replaceable(folder, DESCRIPTION, _WRITTEN)
        from safetensors.torch import save_file

        tied = tied_names(self.t5)
        repeated = {name for _, *others in tied for name in others}
        state = {name: value.contiguous() for name, value in self.t5.state_dict().items() if name not in repeated}
        description = {
            "task": self.task,
            "class": type(self.t5).__name__,
            "adapter": adapter_arguments(self.layout, self.activation),
            "tied": tied,
        }
        with write_directory(folder) as partial:
            self.t5.config.save_pretrained(partial)
            if self.t5.can_generate():
                self.t5.generation_config.save_pretrained(partial)
            save_file(state, partial / "weights.safetensors")
            (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(plain_t5.__file__, partial / "plain_t5.py")

    def save_adapters(self, folder: str | Path, name: str | None = None) -> Path | None:
        """Write the adapters in the format of the ``adapters`` library, whose ``load_adapter(folder)`` reads them.

        Args:
            folder: where to write. The files appear in one step, and replace those of an earlier call.
            name: the adapter's name there, by default the task's.

        Returns:
            Where the T5 is that the adapters belong to, ``folder / "t5"``, if the model trained some of the T5's own
            parameters (``unfreeze_layer_norms`` does): the T5 that it started from would give other answers. None where
            it is the T5 that the model was made of.

        Raises:
            ValueError: the library has no such adapters (``train_adapters_blocks=False``, no adapters at all), no T5 of
                this class, or no adapter of this name; or as for :meth:`save`.
            OSError: the folder cannot be written, or has files that no earlier call wrote.
        """
        from .adapterhub import save

        self._expect_loadable()
        return save(self, Path(folder), self.task if name is None else name)

    def _expect_loadable(self) -> None:
        """Raise ValueError where the T5 is not one that its class and its configuration alone can build again."""
        for name, parameter in self.t5.named_parameters():
            if not is_plain(parameter):
                raise ValueError(f"{name} is quantised or not in memory: save a T5 in floating point")
        t5: Any = self.t5
        if not type(t5).__module__.startswith("transformers."):
            raise ValueError(
                f"this T5 is a {type(t5).__name__}, and only transformers' own classes can be loaded again: take out "
                "what was put around it (PEFT's merge_and_unload() does)"
            )
        with torch.device("meta"):
            names = type(t5)(t5.config).state_dict().keys()
        found = {name for name in t5.state_dict() if ".adapter." not in name}
        for name in sorted(found ^ names):
            raise ValueError(
                f"{name} is {'no parameter' if name in found else 'a parameter'} of a {type(t5).__name__} of this "
                "configuration, so that this T5 could not be loaded again: take out what was put into it (PEFT's "
                "merge_and_unload() does)"
            )


def materialize(model: HyperFormerModel, task: str) -> MaterializedTask:
    """``HyperFormerModel.materialize``."""
    config = model.hyperformer_config
    config.task_id(task)
    packed = packed_weights(model, [task])
    t5 = plain_copy(model)
    layout: AdapterLayout | None = None
    if packed:
        nets: Any = model.hypernetworks
        layout = nets["encoder"].layout
        plain_t5.add_adapters(t5, **adapter_arguments(layout, config.non_linearity))
        for site in find_sites(t5):
            weights = packed[site.stack][nets[site.stack].site(site.layer, site.position), 0]
            adapter: Any = site.module.adapter
            # Generated weights keep float32 precision under a half-precision T5.
            adapter.to(next(site.module.parameters()).device, torch.promote_types(weights.dtype, torch.float32))
            parts = layout.unpack(weights)
            adapter.load_state_dict({_PARAMETERS[name]: part for name, part in parts.items()})
    trained = tuple(model._snapshot.trained)
    return MaterializedTask(task, t5.requires_grad_(False).eval(), layout, config.non_linearity, trained)


def plain_copy(model: HyperFormerModel) -> PreTrainedModel:
    """A copy of a model's T5 in ``eval()``, without adapters and not fused.

    Raises:
        ValueError: its weights are not in memory, or spread over processes.
        RuntimeError: the model was unloaded.
    """
    expect_whole(model._base)
    t5 = copy.deepcopy(model._base)
    remove_hooks(t5)
    return unfuse_t5(t5).eval()


def adapter_arguments(layout: AdapterLayout, activation: str) -> dict[str, Any]:
    """The arguments of ``plain_t5.Adapter`` for adapters of this layout."""
    b = None if isinstance(layout, NormLayout) else layout.b
    return {
        "d": layout.d,
        "b": b,
        "activation": activation,
        "norm_before": layout.pre_norm,
        "norm_after": layout.post_norm,
    }
