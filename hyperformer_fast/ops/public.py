"""The public functions of the ops.

A call takes one of three paths, which compute the same. In eager mode an autograd function calls the backend directly
(eager.py). Under a compiler, and with tensor subclasses, the registered op ``hyperformer_fast::*`` is called
(registered.py). Under functorch transforms and forward-mode AD the op runs in plain PyTorch, because a kernel would
drop the tangents (functorch.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import backends
from ..activations import canonical_activation
from ..backends import Backend
from ..layout import AdapterLayout, AdapterSpec, Folded
from . import eager, functorch
from .checks import check_adapter, check_generate, check_hyper_adapter, check_task_range
from .registered import request_dtype


def _spec(layout: AdapterLayout, activation: str) -> AdapterSpec:
    return AdapterSpec(layout, canonical_activation(activation))


_cached_spec = functools.lru_cache(maxsize=256)(_spec)


def spec_of(layout: AdapterLayout, activation: str) -> AdapterSpec:
    # Do not use the cache under a compiler, which would warn and trace through it, or for an activation of a wrong
    # type, which may not be hashable.
    cached = isinstance(activation, str) and not torch.compiler.is_compiling()
    return (_cached_spec if cached else _spec)(layout, activation)


def traced(*tensors: Tensor) -> bool:
    """Whether to call the registered op: under a compiler, or if an argument is a tensor subclass (fake tensors,
    distributed tensors, ...)."""
    if torch.compiler.is_compiling():
        return True
    for t in tensors:
        kind = type(t)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return True
    return False


def backend_for(op: str, x: Tensor, weights: Tensor, layout: AdapterLayout, impl: str | None) -> Backend:
    dtype = request_dtype(x.dtype, weights.dtype)
    return backends.serving(op, x.device.type, dtype, layout.d, layout.b, impl)


def generate_weights(E: Tensor, G: Tensor, g0: Tensor, *, impl: str | None = None) -> Tensor:
    """Generate the packed weights of many adapters: ``packed[q, i] = G[q] @ E[q, i] + g0[q]`` (paper section 3.2).

    Args:
        E: [Q, n, k] embeddings.
        G: [Q, P, k] generators, one per q.
        g0: [Q, P] their biases.
        impl: the name of the backend to use. With None, :func:`hyperformer_fast.use_backend`, the environment or the
            ranked order decides (``hyperformer_fast.backends.choice`` explains how).

    Returns:
        packed [Q, n, P], in the inputs' dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together (the message names both), or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_generate(E, G, g0)
        functorch.refuse_kernels("generate_weights", impl)
        return functorch.generate_weights(E, G, g0)
    if traced(E, G, g0):
        packed: Tensor = torch.ops.hyperformer_fast.generate_weights(E, G, g0, impl=impl)
        return packed
    check_generate(E, G, g0)
    backend = backends.serving("generate_weights", E.device.type, E.dtype, impl=impl)
    return eager.generate_weights(E, G, g0, backend)


def independent_rows(E: Tensor) -> int | None:
    """``Backend.independent_rows`` of the backend that :func:`generate_weights` calls for embeddings like E."""
    if functorch.in_force() or traced(E):
        return None
    return backends.serving("generate_weights", E.device.type, E.dtype).independent_rows(E.dtype)


def fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype, *, impl: str | None = None) -> Folded:
    """Fold the norms of many adapters into their projections (docs/design.md); it is done once per training step.

    The result has no gradient: :func:`adapter` computes that of ``packed``.

    Args:
        packed: [..., P].
        layout: the layout of ``packed``.
        dtype: the dtype of the x to come.
        impl: as in :func:`generate_weights`.

    Raises:
        ValueError: the last dimension is not P, a dtype is not floating, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    return Folded(*torch.ops.hyperformer_fast.fold(packed.detach(), *layout.arguments, dtype, impl=impl))


def adapter(
    x: Tensor,
    packed: Tensor,
    layout: AdapterLayout,
    activation: str,
    folded: Folded | None = None,
    task_index: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Apply the adapters of one site: ``x + norm_post(up(act(down(norm_pre(x)))))`` (paper section 2).

    Args:
        x: [..., d], or [B, ..., d] with ``task_index``, in float32, bfloat16, float16 or float64.
        packed: [T, P], the site's weights of T tasks; T = 1 without ``task_index``. It gets a gradient even if
            ``folded`` is passed.
        layout: the layout of ``packed``.
        activation: ``gelu_new``, ``gelu``, ``relu`` or ``silu``.
        folded: ``fold(packed, layout, x.dtype)``, if the caller has it already. By default it is computed here.
        task_index: [B] int32 or int64 on x's device, the task of each sample. The output of a sample with -1 is its
            input, bit for bit. Another value outside of 0 .. T-1 is an error on the CPU; on a GPU, where it is not
            checked, the sample's output is NaN.
        impl: as in :func:`generate_weights`; it also applies to the fold and the backward.

    Returns:
        A new tensor of x's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together (the message names both), or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    spec = spec_of(layout, activation)
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_adapter(x, packed, folded, layout, task_index)
            check_task_range(task_index, packed.shape[0])
        functorch.refuse_kernels("adapter_forward", impl)
        return functorch.adapter(x, packed, spec, task_index)
    if folded is None:
        folded = fold(packed, layout, x.dtype, impl=impl)
    save = torch.is_grad_enabled() and (x.requires_grad or packed.requires_grad)
    if traced(x, packed):
        op = torch.ops.hyperformer_fast.adapter_forward
        out: Tensor = op(x, packed, *folded, task_index, *spec.arguments, save, impl=impl)[0]
        return out
    check_adapter(x, packed, folded, layout, task_index)
    check_task_range(task_index, packed.shape[0])
    return checked_adapter(x, packed, folded, spec, task_index, save, impl)


def checked_adapter(
    x: Tensor,
    packed: Tensor,
    folded: Folded,
    spec: AdapterSpec,
    task_index: Tensor | None,
    save: bool,
    impl: str | None = None,
) -> Tensor:
    """:func:`adapter` in eager mode, for arguments that were checked."""
    forward = backend_for("adapter_forward", x, packed, spec.layout, impl)
    if not save:
        return forward.adapter_forward(x, folded, spec, task_index, False)[0]
    backward = backend_for("adapter_backward", x, packed, spec.layout, impl)
    return eager.adapter(x, packed, folded, spec, task_index, forward, backward)


def hyper_adapter(
    x: Tensor,
    E: Tensor,
    G: Tensor,
    g0: Tensor,
    layout: AdapterLayout,
    activation: str,
    task_index: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Generate, fold and apply one adapter in one call.

    Args:
        x: [..., d], or [B, ..., d] with ``task_index``.
        E: [T, k], the embeddings of T tasks; T = 1 without ``task_index``.
        G: [P, k], the generator.
        g0: [P], the generator's bias.
        layout: as in :func:`adapter`.
        activation: as in :func:`adapter`.
        task_index: as in :func:`adapter`.
        impl: as in :func:`adapter`.

    Returns:
        The result of :func:`adapter` with ``packed = E @ G.T + g0``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together (the message names both), or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    spec = spec_of(layout, activation)
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_hyper_adapter(x, E, G, g0, layout, task_index)
            check_task_range(task_index, E.shape[0])
        functorch.refuse_kernels("hyper_adapter", impl)
        packed = functorch.generate_weights(E.unsqueeze(0), G.unsqueeze(0), g0.unsqueeze(0)).squeeze(0)
        return functorch.adapter(x, packed, spec, task_index)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, E, G, g0))
    if traced(x, E, G, g0):
        op = torch.ops.hyperformer_fast.hyper_adapter
        out: Tensor = op(x, E, G, g0, task_index, *spec.arguments, save, impl=impl)[0]
        return out
    check_hyper_adapter(x, E, G, g0, layout, task_index)
    check_task_range(task_index, E.shape[0])
    forward = backend_for("hyper_adapter", x, E, layout, impl)
    if not save:
        return forward.hyper_adapter(x, E, G, g0, spec, task_index, False)[0]
    backward = backend_for("adapter_backward", x, E, layout, impl)
    return eager.hyper_adapter(x, E, G, g0, spec, task_index, forward, backward)
