"""The ops: schemas, fake kernels and autograd, in this one file; and the functions through which they are called.

A call goes one of two ways to the same kernel. In eager mode a ``torch.autograd.Function`` calls the backend directly
(a registered op with Python autograd costs 33 to 54 us a call, the Function 6 to 11). Under ``torch.compile`` and
``torch.export`` the registered op ``hyperformer_fast::*`` is traced instead, and picks the backend when it runs.
Under torch.func's transforms and forward-mode AD there is no kernel at all: transforms.py.

Letters: N rows, d width, b bottleneck, T tasks, P packed numbers per adapter, k embedding width, Q generators.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import backends, transforms
from .activations import ACTIVATIONS, canonical_activation
from .backends import Request
from .checks import check_adapter, check_fold, check_generate, check_hyper_adapter, check_task_range
from .layout import AdapterLayout
from .reference import Folded, Saved

_LAYOUT = "int d, int b, bool pre_norm, bool post_norm"
_FOLDED = "Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean"
_SAVED = "Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd"

SCHEMAS = {
    "generate_weights": "(Tensor E, Tensor G, Tensor g0) -> Tensor packed",
    "fold": f"(Tensor packed, {_LAYOUT}, ScalarType dtype) -> ({_FOLDED})",
    "adapter_forward": f"(Tensor x, Tensor packed, {_FOLDED}, Tensor? task_index, {_LAYOUT}, int activation, bool save)"
    f" -> (Tensor out, {_SAVED})",
    "adapter_backward": f"(Tensor g, Tensor x, {_SAVED}, Tensor packed, {_FOLDED}, Tensor? task_index, {_LAYOUT},"
    " int activation, bool need_dx, bool need_dpacked) -> (Tensor dx, Tensor dpacked)",
    "hyper_adapter": f"(Tensor x, Tensor E, Tensor G, Tensor g0, Tensor? task_index, {_LAYOUT}, int activation,"
    f" bool save) -> (Tensor out, {_SAVED}, Tensor packed, {_FOLDED})",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"hyperformer_fast::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)

_layout = functools.lru_cache(AdapterLayout)


def _kernel(op: str, like: Tensor, dtype: torch.dtype, layout: AdapterLayout | None = None):
    d, b = (layout.d, layout.b) if layout is not None else (0, 0)
    return getattr(backends.select(Request(op, like.device.type, dtype, d, b)), op)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.impl("hyperformer_fast::generate_weights", "CompositeExplicitAutograd")
def _generate_kernel(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    check_generate(E, G, g0)
    return _kernel("generate_weights", E, E.dtype)(E, G, g0)


@torch.library.register_fake("hyperformer_fast::generate_weights")
def _generate_fake(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    check_generate(E, G, g0)
    return E.new_empty(E.shape[0], E.shape[1], G.shape[1])


@torch.library.impl("hyperformer_fast::fold", "CompositeExplicitAutograd")
def _fold_kernel(packed: Tensor, d: int, b: int, pre_norm: bool, post_norm: bool, dtype: torch.dtype) -> Folded:
    layout = _layout(d, b, pre_norm, post_norm)
    check_fold(packed, layout, dtype)
    # float64 anywhere asks for float64 sums and results, whichever of the two tensors has it
    asked = torch.float64 if torch.float64 in (dtype, packed.dtype) else dtype
    return _kernel("fold", packed, asked, layout)(packed, layout, dtype)


@torch.library.register_fake("hyperformer_fast::fold")
def _fold_fake(packed: Tensor, d: int, b: int, pre_norm: bool, post_norm: bool, dtype: torch.dtype) -> Folded:
    check_fold(packed, _layout(d, b, pre_norm, post_norm), dtype)
    exact = _accumulator(torch.float64 if torch.float64 in (dtype, packed.dtype) else dtype)
    c, v = (b + 1, b + 2 * d) if post_norm else (0, b + d)
    tails = ((b, d), (b, d), (v,), (b if post_norm else 0,), (c, c), (c,))
    dtypes = (dtype, dtype, exact, exact, exact, exact)
    return Folded(*(packed.new_empty(*packed.shape[:-1], *tail, dtype=t) for tail, t in zip(tails, dtypes)))


@torch.library.impl("hyperformer_fast::adapter_forward", "CompositeExplicitAutograd")
def _forward_kernel(
    x, packed, wd, wg, vectors, scale, root, mean, task_index, d, b, pre_norm, post_norm, activation, save
) -> tuple[Tensor, ...]:
    layout, folded = _layout(d, b, pre_norm, post_norm), Folded(wd, wg, vectors, scale, root, mean)
    check_adapter(x, packed, folded, layout, task_index)
    check_task_range(task_index, packed.shape[0])
    out, saved = _kernel("adapter_forward", x, x.dtype, layout)(
        x, folded, layout, ACTIVATIONS[activation], task_index, save
    )
    return out, *saved


@torch.library.register_fake("hyperformer_fast::adapter_forward")
def _forward_fake(
    x, packed, wd, wg, vectors, scale, root, mean, task_index, d, b, pre_norm, post_norm, activation, save
) -> tuple[Tensor, ...]:
    layout = _layout(d, b, pre_norm, post_norm)
    check_adapter(x, packed, Folded(wd, wg, vectors, scale, root, mean), layout, task_index)
    rows = x.shape[:-1]
    z = x.new_empty(*rows, b) if save else x.new_empty(0)
    statistics = [
        x.new_empty(rows if save and on else (0,), dtype=_accumulator(x.dtype))
        for on in (post_norm, pre_norm, pre_norm)
    ]
    return x.new_empty(x.shape), z, *statistics


@torch.library.impl("hyperformer_fast::adapter_backward", "CompositeExplicitAutograd")
def _backward_kernel(
    g, x, z, r, pre_mean, pre_rstd, packed, wd, wg, vectors, scale, root, mean, task_index,
    d, b, pre_norm, post_norm, activation, need_dx, need_dpacked,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout, folded = _layout(d, b, pre_norm, post_norm), Folded(wd, wg, vectors, scale, root, mean)
    saved = Saved(z, r, pre_mean, pre_rstd)
    check_adapter(x, packed, folded, layout, task_index, g, saved)
    check_task_range(task_index, packed.shape[0])
    kernel = _kernel("adapter_backward", x, x.dtype, layout)
    return kernel(g, x, saved, packed, folded, layout, ACTIVATIONS[activation], task_index, need_dx, need_dpacked)


@torch.library.register_fake("hyperformer_fast::adapter_backward")
def _backward_fake(
    g, x, z, r, pre_mean, pre_rstd, packed, wd, wg, vectors, scale, root, mean, task_index,
    d, b, pre_norm, post_norm, activation, need_dx, need_dpacked,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout, folded = _layout(d, b, pre_norm, post_norm), Folded(wd, wg, vectors, scale, root, mean)
    check_adapter(x, packed, folded, layout, task_index, g, Saved(z, r, pre_mean, pre_rstd))
    return x.new_empty(x.shape if need_dx else (0,)), packed.new_empty(packed.shape if need_dpacked else (0,))


@torch.library.impl("hyperformer_fast::hyper_adapter", "CompositeExplicitAutograd")
def _hyper_kernel(x, E, G, g0, task_index, d, b, pre_norm, post_norm, activation, save) -> tuple[Tensor, ...]:
    layout = _layout(d, b, pre_norm, post_norm)
    check_hyper_adapter(x, E, G, g0, layout, task_index)
    check_task_range(task_index, E.shape[0])
    out, saved, packed, folded = _kernel("hyper_adapter", x, x.dtype, layout)(
        x, E, G, g0, layout, ACTIVATIONS[activation], task_index, save
    )
    return out, *saved, packed, *folded


@torch.library.register_fake("hyperformer_fast::hyper_adapter")
def _hyper_fake(x, E, G, g0, task_index, d, b, pre_norm, post_norm, activation, save) -> tuple[Tensor, ...]:
    layout = _layout(d, b, pre_norm, post_norm)
    check_hyper_adapter(x, E, G, g0, layout, task_index)
    packed = E.new_empty(E.shape[0], layout.numel)
    folded = _fold_fake(packed, d, b, pre_norm, post_norm, x.dtype)
    static = (d, b, pre_norm, post_norm, activation, save)
    return *_forward_fake(x, packed, *folded, task_index, *static), packed, *folded


def _generate_gradients(g: Tensor, E: Tensor, G: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    with torch.autocast(g.device.type, enabled=False):
        return (
            torch.bmm(g, G) if needs[0] else None,
            torch.bmm(g.transpose(1, 2), E) if needs[1] else None,
            g.sum(1) if needs[2] else None,
        )


def _generate_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _generate_backward(ctx, g):
    return _generate_gradients(g, *ctx.saved_tensors, ctx.needs_input_grad)


def _refuse_second_derivative(g: Tensor) -> None:
    # torch's once_differentiable would detach the gradient without a word wherever g itself needs none
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the adapter has no second derivative: call backward without create_graph=True, "
            "or use hyperformer_fast.reference.adapter, which autograd can differentiate twice"
        )
    if transforms.has_tangent(g):
        raise RuntimeError(
            "the adapter's backward has no forward-mode derivative: run its forward, too, within the dual level, "
            "or use torch.func.jvp over torch.func.grad"
        )


def _adapter_setup(ctx, inputs, output) -> None:
    x, packed, *folded, task_index = inputs[:9]
    ctx.static = inputs[9:14]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], packed, *folded, task_index)


def _adapter_backward(ctx, g, *_):
    if g is None:
        return (None,) * 15
    _refuse_second_derivative(g)
    need_dx, need_dpacked = ctx.needs_input_grad[:2]
    dx, dpacked = torch.ops.hyperformer_fast.adapter_backward(g, *ctx.saved_tensors, *ctx.static, need_dx, need_dpacked)
    return (dx if need_dx else None, dpacked if need_dpacked else None, *(None,) * 13)


def _hyper_setup(ctx, inputs, output) -> None:
    x, E, G, _, task_index = inputs[:5]
    ctx.static = inputs[5:10]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(E, G, x, *output[1:], task_index)


def _hyper_backward(ctx, g, *_):
    if g is None:
        return (None,) * 11
    _refuse_second_derivative(g)
    E, G, *saved = ctx.saved_tensors
    need_dx, *need_generator = ctx.needs_input_grad[:4]
    dx, dpacked = torch.ops.hyperformer_fast.adapter_backward(g, *saved, *ctx.static, need_dx, any(need_generator))
    generator = _site_generator_gradients(dpacked, E, G, need_generator)
    return (dx if need_dx else None, *generator, *(None,) * 7)


def _site_generator_gradients(dpacked: Tensor, E: Tensor, G: Tensor, needs) -> tuple[Tensor | None, ...]:
    if not any(needs):
        return None, None, None
    gradients = _generate_gradients(dpacked.unsqueeze(0), E.unsqueeze(0), G.unsqueeze(0), needs)
    return tuple(None if gradient is None else gradient.squeeze(0) for gradient in gradients)


torch.library.register_autograd("hyperformer_fast::generate_weights", _generate_backward, setup_context=_generate_setup)
torch.library.register_autograd("hyperformer_fast::adapter_forward", _adapter_backward, setup_context=_adapter_setup)
torch.library.register_autograd("hyperformer_fast::hyper_adapter", _hyper_backward, setup_context=_hyper_setup)


class _Generate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, E, G, g0):
        ctx.save_for_backward(E, G)
        return _kernel("generate_weights", E, E.dtype)(E, G, g0)

    @staticmethod
    def backward(ctx, g):
        return _generate_gradients(g, *ctx.saved_tensors, ctx.needs_input_grad)


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, folded, layout, activation, task_index):
        out, saved = _kernel("adapter_forward", x, x.dtype, layout)(x, folded, layout, activation, task_index, True)
        ctx.save_for_backward(x, *saved, packed, *folded, task_index)
        ctx.static = layout, activation
        # the backward may run on another thread, where a use_backend block is not seen
        ctx.kernel = _kernel("adapter_backward", x, x.dtype, layout)
        return out

    @staticmethod
    def backward(ctx, g):
        _refuse_second_derivative(g)
        x, z, r, pre_mean, pre_rstd, packed, *folded, task_index = ctx.saved_tensors
        need_dx, need_dpacked = ctx.needs_input_grad[:2]
        saved = Saved(z, r, pre_mean, pre_rstd)
        dx, dpacked = ctx.kernel(g, x, saved, packed, Folded(*folded), *ctx.static, task_index, need_dx, need_dpacked)
        return (dx if need_dx else None, dpacked if need_dpacked else None, None, None, None, None)


class _HyperAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, E, G, g0, layout, activation, task_index):
        out, saved, packed, folded = _kernel("hyper_adapter", x, x.dtype, layout)(
            x, E, G, g0, layout, activation, task_index, True
        )
        ctx.save_for_backward(E, G, x, *saved, packed, *folded, task_index)
        ctx.static = layout, activation
        ctx.kernel = _kernel("adapter_backward", x, x.dtype, layout)
        return out

    @staticmethod
    def backward(ctx, g):
        _refuse_second_derivative(g)
        E, G, x, z, r, pre_mean, pre_rstd, packed, *folded, task_index = ctx.saved_tensors
        need_dx, *need_generator = ctx.needs_input_grad[:4]
        saved = Saved(z, r, pre_mean, pre_rstd)
        dx, dpacked = ctx.kernel(
            g, x, saved, packed, Folded(*folded), *ctx.static, task_index, need_dx, any(need_generator)
        )
        return (dx if need_dx else None, *_site_generator_gradients(dpacked, E, G, need_generator), None, None, None)


def _traced(*tensors: Tensor) -> bool:
    """Whether the registered ops must be called: under a compiler, or with tensor subclasses (fake, distributed,
    ...)."""
    return torch.compiler.is_compiling() or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)


def generate_weights(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    """Generate the packed weights of many adapters: ``packed[q, i] = G[q] @ E[q, i] + g0[q]`` (paper section 3.2).

    Args:
        E: [Q, n, k] embeddings.
        G: [Q, P, k] generators, one per q.
        g0: [Q, P] their biases.

    Returns:
        packed [Q, n, P], in the inputs' dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming both.
    """
    if transforms.active():
        if not torch.compiler.is_compiling():
            check_generate(E, G, g0)
            transforms.require_no_backend("generate_weights")
        return transforms.generate_weights(E, G, g0)
    if _traced(E, G, g0):
        return torch.ops.hyperformer_fast.generate_weights(E, G, g0)
    check_generate(E, G, g0)
    return _Generate.apply(E, G, g0)


def fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    """Fold the norms of many adapters into their projections, once per step (docs/design.md). No gradient flows through
    it.

    Args:
        packed: [..., P].
        layout: how it lies.
        dtype: the dtype of the x to come.

    Raises:
        ValueError: the last dimension is not P, or a dtype is not floating.
    """
    return Folded(
        *torch.ops.hyperformer_fast.fold(packed.detach(), layout.d, layout.b, layout.pre_norm, layout.post_norm, dtype)
    )


def adapter(
    x: Tensor,
    packed: Tensor,
    layout: AdapterLayout,
    activation: str,
    folded: Folded | None = None,
    task_index: Tensor | None = None,
) -> Tensor:
    """``x + norm_post(up(act(down(norm_pre(x)))))`` (paper section 2) with the packed weights of one site.

    Args:
        x: [..., d] in float32, bfloat16, float16 or float64; [B, ..., d] with ``task_index``.
        packed: [T, P] the site's weights; T = 1 without ``task_index``. Gradients reach it, whatever ``folded`` is.
        layout: how ``packed`` lies.
        activation: ``gelu_new``, ``gelu``, ``relu`` or ``silu``.
        folded: ``fold(packed, layout, x.dtype)``, where the caller has it already; made here otherwise.
        task_index: [B] int32 or int64 on x's device: the task of each sample; -1 for no adapter (out is x, bit for
            bit).

    Returns:
        A new tensor of x's shape and dtype. A task_index outside -1 .. T-1 is an error on the CPU; on a device those
        samples are NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming both.
    """
    activation = canonical_activation(activation)
    if transforms.active():
        if not torch.compiler.is_compiling():
            check_adapter(x, packed, folded, layout, task_index)
            check_task_range(task_index, packed.shape[0])
            transforms.require_no_backend("adapter")
        return transforms.adapter(x, packed, layout, activation, task_index)
    if folded is None:
        folded = fold(packed, layout, x.dtype)
    save = torch.is_grad_enabled() and (x.requires_grad or packed.requires_grad)
    if _traced(x, packed):
        static = (layout.d, layout.b, layout.pre_norm, layout.post_norm, ACTIVATIONS.index(activation), save)
        return torch.ops.hyperformer_fast.adapter_forward(x, packed, *folded, task_index, *static)[0]
    check_adapter(x, packed, folded, layout, task_index)
    check_task_range(task_index, packed.shape[0])
    if save:
        return _Adapter.apply(x, packed, folded, layout, activation, task_index)
    return _kernel("adapter_forward", x, x.dtype, layout)(x, folded, layout, activation, task_index, False)[0]


def hyper_adapter(
    x: Tensor,
    E: Tensor,
    G: Tensor,
    g0: Tensor,
    layout: AdapterLayout,
    activation: str,
    task_index: Tensor | None = None,
) -> Tensor:
    """Generate, fold and apply one adapter in one call.

    Args:
        x: [..., d], or [B, ..., d] with ``task_index``.
        E: [T, k] embeddings; T = 1 without ``task_index``.
        G: [P, k] generator.
        g0: [P] its bias.
        layout, activation, task_index: as in :func:`adapter`.

    Returns:
        What :func:`adapter` returns with ``packed = E @ G.T + g0``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming both.
    """
    activation = canonical_activation(activation)
    if transforms.active():
        if not torch.compiler.is_compiling():
            check_hyper_adapter(x, E, G, g0, layout, task_index)
            check_task_range(task_index, E.shape[0])
            transforms.require_no_backend("hyper_adapter")
        packed = transforms.generate_weights(E.unsqueeze(0), G.unsqueeze(0), g0.unsqueeze(0)).squeeze(0)
        return transforms.adapter(x, packed, layout, activation, task_index)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, E, G, g0))
    if _traced(x, E, G, g0):
        static = (layout.d, layout.b, layout.pre_norm, layout.post_norm, ACTIVATIONS.index(activation), save)
        return torch.ops.hyperformer_fast.hyper_adapter(x, E, G, g0, task_index, *static)[0]
    check_hyper_adapter(x, E, G, g0, layout, task_index)
    check_task_range(task_index, E.shape[0])
    if save:
        return _HyperAdapter.apply(x, E, G, g0, layout, activation, task_index)
    return _kernel("hyper_adapter", x, x.dtype, layout)(x, E, G, g0, layout, activation, task_index, False)[0]
