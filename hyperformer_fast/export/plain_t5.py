"""A T5 with the adapters of one task, in plain PyTorch.

This file needs PyTorch, transformers and safetensors, and nothing else. It is copied into every folder that
``HyperFormerModel.materialize(task).save(folder)`` writes, and loads the T5 from there::

    from plain_t5 import load  # with the folder on sys.path

    t5 = load("folder")
    t5.generate(**tokenizer("a text", return_tensors="pt"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
_FLOAT16_MAX = torch.finfo(torch.float16).max


class Adapter(nn.Module):
    """x + norm_after(up(activation(down(norm_before(x))))), each norm where it is on (eps 1e-5).

    It computes in the dtype of its own weights, and returns x's.

    Args:
        d: the width of x.
        b: the width of the bottleneck; None: nothing but the norms.
        activation: a name from ``ACTIVATIONS``.
        norm_before, norm_after: whether there is a layer norm before and after the bottleneck.
    """

    def __init__(self, d: int, b: int | None, activation: str, norm_before: bool, norm_after: bool):
        super().__init__()
        self.activation = activation
        self.norm_before = nn.LayerNorm(d) if norm_before else None
        self.down = None if b is None else nn.Linear(d, b)
        self.up = None if b is None else nn.Linear(b, d)
        self.norm_after = nn.LayerNorm(d) if norm_after else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            # T5's blocks clamp what overflowed, but only behind the adapter, which would make NaN of an infinity.
            x = x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
        y = x.to(next(self.parameters()).dtype)
        if self.norm_before is not None:
            y = self.norm_before(y)
        if self.down is not None and self.up is not None:
            y = self.up(ACTIVATIONS[self.activation](self.down(y)))
        if self.norm_after is not None:
            y = self.norm_after(y)
        return (x + y).to(x.dtype)


def adapted_modules(t5: nn.Module) -> dict[str, nn.Module]:
    """The modules of a T5 that an adapter follows, by name: each block's self-attention and its feed-forward."""
    names = ("SelfAttention", "DenseReluDense")
    return {path: module for path, module in t5.named_modules() if path.rpartition(".")[2] in names}


def add_adapters(t5: nn.Module, **arguments: Any) -> dict[str, Adapter]:
    """Put an adapter behind each of the :func:`adapted_modules`, as its submodule ``adapter``, and return them.

    ``arguments`` are those of :class:`Adapter`. Weights are drawn at random, in float32, on the CPU.
    """
    adapters = {path: Adapter(**arguments) for path in adapted_modules(t5)}
    for path, module in adapted_modules(t5).items():
        module.adapter = adapters[path]
        module.register_forward_hook(_adapt)
    return adapters


def _adapt(module: Any, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (module.adapter(output[0]), *output[1:])
    return module.adapter(output)


def load(folder: str | Path) -> nn.Module:
    """The T5 that was saved in ``folder``, in ``eval()``, on the CPU, in the dtypes in which it was saved."""
    import transformers
    from safetensors.torch import load_file

    folder = Path(folder)
    description = json.loads((folder / "adapters.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, description["class"])
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if fields.get("scale_decoder_outputs") is False:
        # transformers 5 writes this of a T5 v1.1, and that it is tied, for which transformers 4 would take it.
        fields["tie_word_embeddings"] = False
    t5 = kind(kind.config_class.from_dict(fields))
    add_adapters(t5, **description["adapter"])
    state = {name: nn.Parameter(value, False) for name, value in load_file(folder / "weights.safetensors").items()}
    for first, *others in description["tied"]:
        state |= dict.fromkeys(others, state[first])
    t5.load_state_dict(state, assign=True)
    if (folder / "generation_config.json").is_file():
        t5.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return t5.eval()
