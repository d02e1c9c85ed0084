"""The reference implementation of every op, in plain PyTorch, for any floating dtype and any device.

:func:`adapter` computes the adapter as the paper writes it, and autograd can differentiate it. :func:`fold`,
:func:`adapter_forward` and :func:`adapter_backward` compute the same adapter with its layer norm moved into the
bottleneck (docs/design.md). They define what the fused backends must return. The tests compare the two in float64.

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
    """Let callers pass ``layout, activation`` in place of the :class:`AdapterSpec` that ``function`` takes. They get a
    DeprecationWarning."""

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
    """Generate packed adapters: ``packed[q, i] = G[q] @ E[q, i] + g0[q]`` (paper section 3.2).

    Args:
        E: [Q, n, k] embeddings.
        G: [Q, P, k] generators.
        g0: [Q, P] their biases.

    Returns:
        packed [Q, n, P].
    """
    return torch.baddbmm(g0.unsqueeze(1), E, G.transpose(1, 2))


def adapter(
    x: Tensor, packed: Tensor, layout: AdapterLayout, activation: str, task_index: Tensor | None = None
) -> Tensor:
    """Apply the adapter of the paper (section 2). It is differentiable and computed in x's dtype throughout.

    Args:
        x: [..., d], or [B, ..., d] with ``task_index``.
        packed: [T, P]; T = 1 without ``task_index``.
        layout: the layout of ``packed``.
        activation: ``gelu_new``, ``gelu``, ``relu`` or ``silu``.
        task_index: [B] integers; the task of each sample, or -1 for none, which returns the sample as it is.

    Returns:
        x + norm_post(up(act(down(norm_pre(x))))), in x's shape and dtype.
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
    """:func:`adapter` for rows of one task, whose weights are the unpacked parts ``w``."""
    d = (layout.d,)
    y = F.layer_norm(x, d, w["pre_gamma"], w["pre_beta"], EPS) if layout.pre_norm else x
    y = F.linear(activate(F.linear(y, w["down_weight"], w["down_bias"]), activation), w["up_weight"], w["up_bias"])
    return x + (F.layer_norm(y, d, w["post_gamma"], w["post_beta"], EPS) if layout.post_norm else y)


@torch.no_grad()
def fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    """Fold the norms into the projections, and compute R, the square root of the centred up-projection's Gram matrix.

    All sums are computed in float64: the Gram matrix squares the condition number of the up-projection, and R must keep
    the digits that a float32 Gram matrix would lose.

    Args:
        packed: [..., P] of any floating dtype.
        layout: the layout of ``packed``.
        dtype: the compute dtype, which is the dtype of the x to come.
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
    """Return a contiguous copy in ``dtype``, even if ``t`` is one already: an op's outputs may not alias its inputs."""
    return t.to(dtype, copy=True, memory_format=torch.contiguous_format)


def square_root(gram: Tensor) -> Tensor:
    """Return the upper triangular R with R^T R = ``gram``, for a positive semi-definite ``gram`` [..., n, n].

    Unlike torch.linalg.cholesky it accepts a singular matrix, because zero, duplicate and rank-one columns are legal
    weights: a pivot that is lost to rounding leaves a row of zeros.
    """
    n = gram.shape[-1]
    lower = torch.zeros_like(gram)
    lost = torch.finfo(gram.dtype).eps * n * gram.diagonal(dim1=-2, dim2=-1)
    for j in range(n):
        column = gram[..., j:, j] - (lower[..., j:, :j] @ lower[..., j, :j, None]).squeeze(-1)
        pivot = column[..., :1]
        kept = ~(pivot <= lost[..., j : j + 1])  # rather than `pivot > lost`: a NaN pivot must stay visible
        lower[..., j:, j] = torch.where(kept, column / pivot.sqrt(), 0.0)
    return lower.mT.contiguous()


def _power_of_two(m: Tensor) -> Tensor:
    """Return 2^floor(log2 m), clamped to 2^-126 .. 2^126; 1 where m is 0 or not finite."""
    exponent = (torch.frexp(m).exponent - 1).clamp(-126, 126)
    usable = (m > 0) & m.isfinite()
    return torch.where(usable, torch.ldexp(torch.ones_like(m), exponent), 1.0)


class _Rows:
    """The rows of x grouped by sample, as [B, M, ...], and the weights of each sample. Without ``task_index`` all rows
    are one sample."""

    def __init__(self, x: Tensor, T: int, task_index: Tensor | None):
        self.T = T
        self.lead = x.shape[:-1]
        self.B = 1 if task_index is None else x.shape[0]
        self.M = math.prod(self.lead) if task_index is None else math.prod(self.lead[1:])
        self.acc = accumulator_dtype(x.dtype)
        self.index = None if task_index is None else task_index.long().clamp(0, T - 1)
        self.task_index = task_index

    def group(self, t: Tensor) -> Tensor:
        """View t [*lead, ...] as [B, M, ...], in the accumulator's dtype."""
        return t.reshape(self.B, self.M, *t.shape[len(self.lead) :]).to(self.acc)

    def ungroup(self, t: Tensor) -> Tensor:
        """View t [B, M, ...] as [*lead, ...], contiguous."""
        return t.reshape(self.lead + t.shape[2:]).contiguous()

    def weights(self, w: Tensor) -> Tensor:
        """Pick each sample's weights from w [T, ...]: [B, ...], or [1, ...] without ``task_index``."""
        w = w.to(self.acc)
        return w if self.index is None else w[self.index]

    def select(self, adapted: Tensor, passed: Tensor | float) -> Tensor:
        """Return ``adapted`` [B, M, ...] for samples with a task, ``passed`` for those with -1, and NaN for those whose
        task is out of range."""
        if self.task_index is None:
            return adapted
        shape = (-1,) + (1,) * (adapted.dim() - 1)
        task = self.task_index.view(shape)
        chosen = torch.where(task >= 0, adapted, passed)
        return torch.where((task >= self.T) | (task < -1), torch.nan, chosen)

    def sum_by_task(self, per_sample: Tensor) -> Tensor:
        """Sum [B, P] over the samples of each task, in a fixed order, to [T, P]. Samples without a task add nothing."""
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
    """Apply the adapter with its folded weights.

    Arithmetic is in float32, or in float64 if x is float64. Only z is rounded to x's dtype on the way, so that the
    activation here has the same input as in the backward, which reads the rounded z.

    Args:
        x: [..., d], or [B, ..., d] with ``task_index``.
        folded: the weights of T tasks, from :func:`fold`; T = 1 without ``task_index``.
        spec: the adapter's layout and activation.
        task_index: [B] integers; the task of each sample, -1 for none (out is x bit for bit); NaN for any other task.
        save: whether to return what the backward needs.

    Returns:
        out [..., d] in x's dtype, and what :func:`adapter_backward` needs (empty tensors without ``save``).
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
    """Append a 1 to each row: h~ = [h ; 1]."""
    return torch.cat([h, torch.ones_like(h[..., :1])], -1)


def _root_rows(h: Tensor, root: Tensor) -> Tensor:
    """Return q = R [h ; 1] for each row h."""
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
    """Compute the gradients of :func:`adapter_forward` in closed form (docs/design.md has the formulas).

    Args:
        g: [..., d], the gradient of the output.
        x: the input of the forward.
        saved: what the forward saved.
        packed: [T, P], the weights that were folded.
        folded: the folded weights.
        spec: the adapter's layout and activation.
        task_index: as in the forward.
        need_dx: whether dx is needed.
        need_dpacked: whether dpacked is needed.

    Returns:
        dx like x, and dpacked [T, P] like ``packed``; an empty tensor in place of one that is not needed.
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
    """Return the gradient [B, ...] of every part of the packed adapter, for each sample."""
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
