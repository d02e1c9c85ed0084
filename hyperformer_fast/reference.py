"""The truth: every op in plain PyTorch, for any floating dtype, on any device.

:func:`adapter` is the method as the paper writes it, differentiable by autograd. :func:`fold`, :func:`adapter_forward`
and :func:`adapter_backward` are the same adapter with its layer norm solved in the bottleneck (docs/design.md), which
is the contract that the fused backends implement. The tests hold one against the other in float64.

Letters: N rows, d width, b bottleneck, T tasks, P packed numbers per adapter, k embedding width.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate, activate_grad
from .layout import EPS, AdapterLayout, AdapterSpec, Folded, Saved, accumulator_dtype

__all__ = [
    "EPS",
    "Folded",
    "Saved",
    "adapter",
    "adapter_backward",
    "adapter_forward",
    "fold",
    "generate_weights",
    "square_root",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _takes_spec(function: _Function) -> _Function:
    """Accept ``layout, activation`` where ``function`` takes an :class:`AdapterSpec`, with a warning."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        at = next((i for i, argument in enumerate(args) if isinstance(argument, AdapterLayout)), None)
        if at is None and "layout" not in kwargs:
            return function(*args, **kwargs)
        warnings.warn(
            f"reference.{function.__name__}(..., layout, activation, ...) is deprecated: "
            "pass AdapterSpec(layout, activation) in place of the two",
            DeprecationWarning,
            stacklevel=2,
        )
        if at is None:
            return function(*args, spec=AdapterSpec(kwargs.pop("layout"), kwargs.pop("activation")), **kwargs)
        rest = list(args[at + 1 :])
        activation = kwargs.pop("activation") if "activation" in kwargs else rest.pop(0)
        return function(*args[:at], AdapterSpec(args[at], activation), *rest, **kwargs)

    return call  # type: ignore[return-value]


def generate_weights(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    """``G e + g0`` for every embedding (paper section 3.2): E [Q, n, k], G [Q, P, k], g0 [Q, P] -> [Q, n, P]."""
    return torch.baddbmm(g0.unsqueeze(1), E, G.transpose(1, 2))


def adapter(
    x: Tensor, packed: Tensor, layout: AdapterLayout, activation: str, task_index: Tensor | None = None
) -> Tensor:
    """The adapter of the paper (section 2), differentiable, all of it in x's dtype.

    Args:
        x: [..., d], or [B, ..., d] with ``task_index``.
        packed: [T, P]; T = 1 without ``task_index``.
        layout: how ``packed`` lies.
        activation: canonical name.
        task_index: [B] integers; the task of each sample, -1 for none (its output is its input).

    Returns:
        x + norm_post(up(act(down(norm_pre(x))))), x's shape and dtype.
    """
    parts = layout.unpack(packed.to(x.dtype))
    if task_index is None:
        return _adapter_rows(x, {name: part[0] for name, part in parts.items()}, layout, activation)
    samples = []
    for sample, task in zip(x.unbind(0), task_index.tolist()):
        weights = {name: part[task] for name, part in parts.items()}
        samples.append(sample if task < 0 else _adapter_rows(sample, weights, layout, activation))
    return torch.stack(samples) if samples else x.clone()


def _adapter_rows(x: Tensor, w: dict[str, Tensor], layout: AdapterLayout, activation: str) -> Tensor:
    d = (layout.d,)
    y = F.layer_norm(x, d, w["pre_gamma"], w["pre_beta"], EPS) if layout.pre_norm else x
    y = F.linear(activate(F.linear(y, w["down_weight"], w["down_bias"]), activation), w["up_weight"], w["up_bias"])
    return x + (F.layer_norm(y, d, w["post_gamma"], w["post_beta"], EPS) if layout.post_norm else y)


@torch.no_grad()
def fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    """Fold the norms into the projections, and take the square root of the Gram matrix of the centred up-projection.

    Sums run in float64: the row variance is a sum of squares of R h, so R must not lose what the Gram matrix squares.

    Args:
        packed: [..., P] of any floating dtype.
        layout: how it lies.
        dtype: the compute dtype, x's.
    """
    exact = accumulator_dtype(dtype, packed.dtype)
    w = layout.unpack(packed.double())
    wd, down_bias = w["down_weight"], w["down_bias"]
    if layout.pre_norm:
        down_bias = down_bias + (wd @ w["pre_beta"].unsqueeze(-1)).squeeze(-1)
        wd = wd * w["pre_gamma"].unsqueeze(-2)
    if not layout.post_norm:
        vectors = torch.cat([down_bias, w["up_bias"]], -1)
        empty = [spec.empty(packed) for spec in Folded.table(layout, packed.shape[:-1], dtype, exact)[3:]]
        return Folded(_fresh(wd, dtype), _fresh(w["up_weight"].mT, dtype), _fresh(vectors, exact), *empty)
    wa = torch.cat([w["up_weight"], w["up_bias"].unsqueeze(-1)], -1)
    mean = wa.mean(-2)
    wa = wa - mean.unsqueeze(-2)
    root = square_root(wa.mT @ wa / layout.d)
    wg = w["post_gamma"].unsqueeze(-1) * wa
    scale = _power_of_two(wg[..., :-1].abs().amax(-2))
    vectors = torch.cat([down_bias, wg[..., -1], w["post_beta"]], -1)
    wg = wg[..., :-1] / scale.unsqueeze(-2)
    return Folded(_fresh(wd, dtype), _fresh(wg.mT, dtype), *(_fresh(t, exact) for t in (vectors, scale, root, mean)))


def _fresh(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, even where nothing needs converting: an op's outputs may not alias its inputs."""
    return t.to(dtype, copy=True, memory_format=torch.contiguous_format)


def square_root(gram: Tensor) -> Tensor:
    """The upper triangular R with R^T R = ``gram`` [..., n, n], positive semi-definite. A pivot lost to rounding leaves
    an empty row.

    Zero, duplicate and rank-one columns are legal weights, on which a library's Cholesky factorisation fails.
    """
    n = gram.shape[-1]
    lower = torch.zeros_like(gram)
    lost = torch.finfo(gram.dtype).eps * n * gram.diagonal(dim1=-2, dim2=-1)
    for j in range(n):
        column = gram[..., j:, j] - (lower[..., j:, :j] @ lower[..., j, :j, None]).squeeze(-1)
        pivot = column[..., :1]
        kept = ~(pivot <= lost[..., j : j + 1])  # not `pivot > lost`: a NaN pivot must stay visible
        lower[..., j:, j] = torch.where(kept, column / pivot.sqrt(), 0.0)
    return lower.mT.contiguous()


def _power_of_two(m: Tensor) -> Tensor:
    """2^floor(log2 m) within float32's normal range; 1 where m is 0 or not finite."""
    exponent = (torch.frexp(m).exponent - 1).clamp(-126, 126)
    usable = (m > 0) & m.isfinite()
    return torch.where(usable, torch.ldexp(torch.ones_like(m), exponent), 1.0)


class _Rows:
    """Groups the rows of x by sample, as [B, M, ...] (B = 1 without ``task_index``), and finds each group's weights."""

    def __init__(self, x: Tensor, T: int, task_index: Tensor | None):
        self.T = T
        self.lead = x.shape[:-1]
        self.B = 1 if task_index is None else x.shape[0]
        self.M = math.prod(self.lead) if task_index is None else math.prod(self.lead[1:])
        self.acc = accumulator_dtype(x.dtype)
        self.index = None if task_index is None else task_index.long().clamp(0, T - 1)
        self.task_index = task_index

    def group(self, t: Tensor) -> Tensor:
        return t.reshape(self.B, self.M, *t.shape[len(self.lead) :]).to(self.acc)

    def ungroup(self, t: Tensor) -> Tensor:
        return t.reshape(self.lead + t.shape[2:]).contiguous()

    def weights(self, w: Tensor) -> Tensor:
        """The weights of each sample, [B or 1, ...], of w [T, ...]."""
        w = w.to(self.acc)
        return w if self.index is None else w[self.index]

    def select(self, adapted: Tensor, passed: Tensor | float) -> Tensor:
        """``adapted`` [B, M, ...] where a task is given, ``passed`` where it is -1, NaN where it is out of range."""
        if self.task_index is None:
            return adapted
        shape = (-1,) + (1,) * (adapted.dim() - 1)
        task = self.task_index.view(shape)
        chosen = torch.where(task >= 0, adapted, passed)
        return torch.where((task >= self.T) | (task < -1), torch.nan, chosen)

    def sum_by_task(self, per_sample: Tensor) -> Tensor:
        """The sums over each task's samples, [T, P], of [B, P]; in a fixed order, without samples that have no task."""
        if self.task_index is None:
            return per_sample
        out = per_sample.new_zeros(self.T, per_sample.shape[-1])
        for t in range(self.T):
            out[t] = torch.where((self.task_index == t).unsqueeze(-1), per_sample, 0.0).sum(0)
        return out


@_takes_spec
def adapter_forward(
    x: Tensor,
    folded: Folded,
    spec: AdapterSpec,
    task_index: Tensor | None = None,
    save: bool = True,
) -> tuple[Tensor, Saved]:
    """The adapter through its folded weights: out [..., d] in x's dtype, and what the backward needs (empty without
    ``save``).

    Arithmetic is float32 (float64 in float64); only z is rounded to x's dtype on the way, as the backward will see it.
    """
    layout, activation = spec.layout, spec.activation
    d, b = layout.d, layout.b
    rows = _Rows(x, folded.wd.shape[0], task_index)
    x3 = rows.group(x)
    vectors = rows.weights(folded.vectors).unsqueeze(1)
    empty = x.new_empty(0, dtype=rows.acc)
    pre_mean, pre_rstd = empty, empty
    source = x3
    if layout.pre_norm:
        pre_mean = x3.mean(-1)
        centred = x3 - pre_mean.unsqueeze(-1)
        pre_rstd = (centred.square().mean(-1) + EPS).rsqrt()
        source = centred * pre_rstd.unsqueeze(-1)
        pre_mean, pre_rstd = rows.select(pre_mean, 0.0), rows.select(pre_rstd, 0.0)
    z = (source @ rows.weights(folded.wd).mT + vectors[..., :b]).to(x.dtype)
    h = activate(z.to(rows.acc), activation)
    y = (h * rows.weights(folded.scale).unsqueeze(1) if layout.post_norm else h) @ rows.weights(folded.wg)
    y = y + vectors[..., b : b + d]
    r = empty
    if layout.post_norm:
        r = (_root_rows(h, rows.weights(folded.root)).square().sum(-1) + EPS).rsqrt()
        y = y * r.unsqueeze(-1) + vectors[..., b + d :]
        r = rows.select(r, 0.0)
    out = rows.ungroup(rows.select((x3 + y).to(x.dtype), x.reshape(rows.B, rows.M, d)))
    if not save:
        return out, Saved.empty(x, layout, save=False)
    saved = (rows.ungroup(t) if t is not empty else torch.empty_like(t) for t in (r, pre_mean, pre_rstd))
    return out, Saved(rows.ungroup(rows.select(z, 0.0)), *saved)


def _with_one(h: Tensor) -> Tensor:
    return torch.cat([h, torch.ones_like(h[..., :1])], -1)


def _root_rows(h: Tensor, root: Tensor) -> Tensor:
    """q = R [h ; 1], row by row."""
    return _with_one(h) @ root.mT


@_takes_spec
def adapter_backward(
    g: Tensor,
    x: Tensor,
    saved: Saved,
    packed: Tensor,
    folded: Folded,
    spec: AdapterSpec,
    task_index: Tensor | None = None,
    need_dx: bool = True,
    need_dpacked: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`adapter_forward`, in closed form (docs/design.md): dx like x, dpacked [T, P] like ``packed``.

    What is not needed is returned as an empty tensor.
    """
    layout, activation = spec.layout, spec.activation
    d, b = layout.d, layout.b
    rows = _Rows(x, packed.shape[0], task_index)
    g3, z = rows.group(g), rows.group(saved.z)
    h = activate(z, activation)
    wg = rows.weights(folded.wg)
    if layout.post_norm:
        r = rows.group(saved.r).unsqueeze(-1)
        bg = rows.weights(folded.vectors)[..., b : b + d]
        root = rows.weights(folded.root)
        t = torch.cat([g3 @ wg.mT * rows.weights(folded.scale).unsqueeze(1), (g3 @ bg.unsqueeze(-1))], -1)
        rh = r * _with_one(h)
        m2 = (t * rh).sum(-1, keepdim=True) / d
        dh = (r * (t - m2 * d * r * (_root_rows(h, root) @ root)))[..., :b]
    else:
        rh, m2 = _with_one(h), None
        dh = g3 @ wg.mT
    dz = dh * activate_grad(z, activation)
    source, pre_rstd = rows.group(x), None
    if layout.pre_norm:
        pre_rstd = rows.group(saved.pre_rstd).unsqueeze(-1)
        source = (source - rows.group(saved.pre_mean).unsqueeze(-1)) * pre_rstd
    dx, dpacked = x.new_empty(0), packed.new_empty(0)
    if need_dx:
        branch = dz @ rows.weights(folded.wd)
        if pre_rstd is not None:
            along = (branch * source).mean(-1, keepdim=True)
            branch = pre_rstd * (branch - branch.mean(-1, keepdim=True) - source * along)
        dx = rows.ungroup(rows.select((g3 + branch).to(x.dtype), g.reshape(rows.B, rows.M, d)))
    if need_dpacked:
        parts = _weight_gradients(rows, g3, source, dz, rh, m2, packed, folded, layout)
        dpacked = rows.sum_by_task(layout.pack(parts)).to(packed.dtype)
    return dx, dpacked


def _weight_gradients(
    rows: _Rows,
    g: Tensor,
    source: Tensor,
    dz: Tensor,
    rh: Tensor,
    m2: Tensor | None,
    packed: Tensor,
    folded: Folded,
    layout: AdapterLayout,
) -> dict[str, Tensor]:
    """Per-sample gradients [B, ...] of every part of the packed adapter."""
    w = {name: rows.weights(part) for name, part in layout.unpack(packed).items()}
    down, dbias = dz.mT @ source, dz.sum(1)
    parts = {"down_weight": down, "down_bias": dbias}
    if layout.pre_norm:
        parts["pre_gamma"] = (w["down_weight"] * down).sum(1)
        parts["pre_beta"] = (w["down_weight"] * dbias.unsqueeze(-1)).sum(1)
        parts["down_weight"] = down * w["pre_gamma"].unsqueeze(1) + dbias.unsqueeze(-1) * w["pre_beta"].unsqueeze(1)
    A = g.mT @ rh
    if m2 is not None:
        wa = torch.cat([w["up_weight"], w["up_bias"].unsqueeze(-1)], -1) - rows.weights(folded.mean).unsqueeze(1)
        parts["post_gamma"], parts["post_beta"] = (wa * A).sum(-1), g.sum(1)
        A = w["post_gamma"].unsqueeze(-1) * A - wa @ ((m2 * rh).mT @ rh)
        A = A - A.mean(1, keepdim=True)
    parts["up_weight"], parts["up_bias"] = A[..., :-1], A[..., -1]
    return parts
