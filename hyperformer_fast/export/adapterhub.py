"""The adapters of one task in the format of the ``adapters`` library (AdapterHub).

Its bottleneck adapter computes what ours does: behind self-attention and feed-forward, before the residual add, with a
layer norm (eps 1e-5) before and after the bottleneck, and its own skip after that norm. So weights go over as they are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..atomic import write_directory
from ..norm_only import NormLayout
from ..tiny import name_of
from .folder import check_replaceable

if TYPE_CHECKING:
    from ..layout import AdapterLayout
    from .materialize import MaterializedTask

#: The names that the library looks for in a folder.
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "pytorch_adapter.bin"

#: The file by which a folder is known to be ours, which the library leaves alone: its own have the other names, too.
MARK_NAME = "exported_by_hyperformer_fast.json"

#: The version of the library whose format this is; it reads files of earlier versions.
_VERSION = "1.3.0"

#: The T5s that the library knows, and what it writes of their classes.
_CLASSES = ("T5Model", "T5ForConditionalGeneration")


def save(plain: MaterializedTask, folder: Path, name: str) -> Path | None:
    """``MaterializedTask.save_adapters``."""
    layout = plain.layout
    if layout is None:
        raise ValueError("variant 'finetuning' has no adapters that the adapters library could load")
    if isinstance(layout, NormLayout):
        raise ValueError(
            "train_adapters_blocks=False leaves layer norms without a bottleneck, which the adapters library has not: "
            "use save(folder)"
        )
    if type(plain.t5).__name__ not in _CLASSES:
        raise ValueError(
            f"the adapters library has adapters for {' and '.join(_CLASSES)}, not for {type(plain.t5).__name__}: "
            "use save(folder)"
        )
    if not re.fullmatch(r"[^.]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"the adapters library cannot have an adapter of the name {name!r}, because it is a module's name there: "
            "pass another one as name="
        )
    check_replaceable(folder, MARK_NAME, (CONFIG_NAME, WEIGHTS_NAME, "t5"))
    t5: Any = plain.t5
    description = {
        "config": _config(layout, plain.activation),
        "hidden_size": layout.d,
        "model_class": type(t5).__name__,
        "model_name": name_of(t5),
        "model_type": t5.config.model_type,
        "name": name,
        "version": f"adapters.{_VERSION}",
    }
    state: dict[str, Tensor] = {}
    for path, adapter in plain.adapters.items():
        owner = path.rpartition(".")[0]  # the sublayer, with T5's norm and dropout
        state |= {f"{owner}.adapters.{name}.{key}": value for key, value in _state(adapter, layout).items()}
    with write_directory(folder) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        torch.save(state, partial / WEIGHTS_NAME)
        (partial / MARK_NAME).write_text(json.dumps({"task": plain.task}) + "\n", encoding="utf-8")
        if plain.trained:
            own = {key: value for key, value in t5.state_dict().items() if ".adapter." not in key}
            t5.save_pretrained(partial / "t5", state_dict=own)
    return folder / "t5" if plain.trained else None


def _config(layout: AdapterLayout, activation: str) -> dict[str, Any]:
    """The fields of its ``BnConfig``; all others keep their defaults."""
    return {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "leave_out": [],
        "ln_after": layout.post_norm,
        "ln_before": layout.pre_norm,
        "mh_adapter": True,
        "non_linearity": activation,
        "original_ln_after": True,
        "original_ln_before": False,
        "output_adapter": True,
        "reduction_factor": layout.d // layout.b,  # it divides, and rounds down
        "residual_before_ln": True,
        "scaling": 1.0,
    }


def _state(adapter: nn.Module, layout: AdapterLayout) -> dict[str, Tensor]:
    """The parameters of an adapter under its names."""
    norm = "adapter_norm_before"
    down = "adapter_down.1" if layout.pre_norm else "adapter_down.0"
    renamed = {"down": down, "up": "adapter_up", "norm_after": "adapter_norm_after", "norm_before": norm}
    found: dict[str, Tensor] = {}
    for key, value in adapter.state_dict().items():
        part, _, kind = key.partition(".")
        found[f"{renamed[part]}.{kind}"] = value.detach().cpu().clone()
    if layout.pre_norm:
        # There the norm is part of the sequence as well.
        found |= {f"adapter_down.0.{kind}": found[f"{norm}.{kind}"] for kind in ("weight", "bias")}
    return found
