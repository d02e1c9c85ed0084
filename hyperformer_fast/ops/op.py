"""What a registered op is: its schema, and how an implementation, a fake kernel and an autograd formula are added.

A bundle (a type of layout.py, such as ``Folded``) is one argument of these functions, but several arguments of a
schema; ``Op`` converts between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import DROPOUT_SCHEMA, LAYOUT_SCHEMA, SPEC_SCHEMA, AdapterLayout, AdapterSpec, Dropout, Folded, Saved

#: For each bundle, its arguments in a schema and the function that makes the bundle from them.
_BUNDLES: dict[str, tuple[str, Callable[..., Any]]] = {
    "layout": (LAYOUT_SCHEMA, AdapterLayout.from_arguments),
    "spec": (SPEC_SCHEMA, AdapterSpec.from_arguments),
    "folded": (", ".join(f"Tensor {field}" for field in Folded._fields), Folded),
    "dropout": (DROPOUT_SCHEMA, Dropout),
    "saved": (", ".join(f"Tensor {field}" for field in Saved._fields), Saved),
}

#: The schema of each op. All end with ``impl``, the name of the backend that is asked for.
SCHEMAS: dict[str, str] = {}


class Op:
    """One registered op.

    Args:
        name: its name, without the namespace.
        inputs: its arguments as in a schema, except that a bundle is its name in braces.
        outputs: its results, written likewise.
    """

    def __init__(self, name: str, inputs: str, outputs: str):
        self.name = f"hyperformer_fast::{name}"
        self._inputs = inputs.split(", ")
        texts = {bundle: text for bundle, (text, _) in _BUNDLES.items()}
        SCHEMAS[name] = f"({inputs}, *, str? impl=None) -> ({outputs})".format_map(texts)
        torch.library.define(self.name, SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        self.count = SCHEMAS[name].partition(", *")[0].count(",") + 1

    def bundled(self, arguments: Sequence[Any]) -> Iterator[Any]:
        """Convert the arguments of a call: those that belong to a bundle become the bundle."""
        at = 0
        for argument in self._inputs:
            if argument.startswith("{"):
                text, bundle = _BUNDLES[argument[1:-1]]
                width = text.count(",") + 1
                yield bundle(*arguments[at : at + width])
            else:
                width = 1
                yield arguments[at]
            at += width

    def implement(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``function(*bundled arguments, impl)`` as the implementation for every device."""

        def call(*arguments: Any, impl: str | None = None) -> Any:
            return _flat(function(*self.bundled(arguments), impl))

        torch.library.impl(self.name, "CompositeExplicitAutograd", call)
        return function

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``function(*bundled arguments)`` as the fake kernel."""

        def call(*arguments: Any, impl: str | None = None) -> Any:
            return _flat(function(*self.bundled(arguments)))

        torch.library.register_fake(self.name, call)
        return function

    def differentiate(self, setup: Callable[..., None], backward: Callable[..., Any], *also: int) -> None:
        """Register the autograd formula.

        Args:
            setup: called as ``setup(ctx, inputs, outputs)``, where bundles are one input each.
            backward: called as ``backward(ctx, g)`` with the gradient of the first output, unless there is none. It
                returns the gradients of the first inputs; the other inputs have none.
            also: the indices of further outputs whose gradients ``backward`` gets. One of them can be None.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
            ctx.impl = keyword_only_inputs["impl"]
            setup(ctx, tuple(self.bundled(inputs)), output)

        def call(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            given = [of_outputs[i] for i in (0, *also)]
            gradients = () if all(g is None for g in given) else backward(ctx, *given)
            return (*gradients, *(None,) * (self.count - len(gradients)))

        torch.library.register_autograd(self.name, call, setup_context=setup_context)


def _flat(outputs: Any) -> Any:
    """Convert a function's results to those of the op: each bundle becomes its tensors."""
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(t for output in outputs for t in (output if isinstance(output, tuple) else (output,)))
