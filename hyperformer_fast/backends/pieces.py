"""The pieces of a T5 between its matrix products, as methods of a backend, each with a default in plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import t5_reference as truth
from ..layout import Dropout

#: The names of these ops. ``adapter_residual_forward`` is a method of ``Backend`` itself, beside the adapter's others.
PIECE_OPS = (
    "residual_forward",
    "residual_backward",
    "act_dropout_forward",
    "act_dropout_backward",
    "softmax_dropout_forward",
    "softmax_dropout_backward",
    "attention_forward",
    "attention_backward",
    "cross_entropy_forward",
    "adapter_residual_forward",
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _plain(method: _Method) -> _Method:
    """Run a method without autograd and autocast: the ops themselves define the dtype of every result."""

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        kind = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        cast = torch.is_autocast_enabled(kind)
        with torch.no_grad(), torch.autocast(kind, enabled=False) if cast else contextlib.nullcontext():
            return method(self, *args)

    return call  # type: ignore[return-value]


class PieceKernels:
    """The kernels for the pieces of a T5. ``t5_reference`` defines what they compute.

    The methods get checked arguments: tensors on one device, whose shapes fit together; a dropout whose p is 0 if it
    rounds to 0. Tensors may have any strides. Results are new contiguous tensors, except where another layout is named,
    and a result that is not wanted is an empty tensor [0]. Every run, with any number of threads, gives the same bits.
    The dropout of a tensor [..., n] is that of philox.py.
    """

    @_plain
    def residual_forward(
        self,
        hidden: Tensor | None,
        y: Tensor,
        dropout: Dropout,
        weight: Tensor | None,
        eps: float,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute ``out = hidden + dropout(y)``, and ``normed``, T5's layer norm of it.

        Args:
            hidden: of y's shape and dtype; None: y itself is normed, and there is no dropout.
            y: [..., n].
            dropout: the dropout of y.
            weight: [n], the weight of the norm, in any floating dtype; None: nothing is normed.
            eps: the epsilon of the norm.
            save: whether a backward will follow.

        Returns:
            ``out`` in y's dtype, empty without ``hidden``; ``normed`` in ``layout.normed_dtype``, empty without
            ``weight``; and with ``save`` and ``weight`` the float32 ``rstd`` [...], the reciprocal root mean square of
            each row of ``out`` as it was rounded.
        """
        return truth.residual_forward(hidden, y, dropout, weight, eps, save)

    @_plain
    def residual_backward(
        self,
        g_out: Tensor | None,
        g_normed: Tensor | None,
        out: Tensor | None,
        weight: Tensor | None,
        rstd: Tensor | None,
        dropout: Dropout,
        need_dy: bool,
        need_dweight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of :meth:`residual_forward`.

        Args:
            g_out: the gradient of ``out``; None if there is none.
            g_normed: the gradient of ``normed``, in its dtype; None if there is none. One of the two is there.
            out: what was normed: the sum, or y without ``hidden``. None, as are ``weight`` and ``rstd``, where
                ``g_normed`` is None.
            weight: as in the forward.
            rstd: what the forward saved.
            dropout: as in the forward.
            need_dy: whether dy is needed.
            need_dweight: whether dweight is needed.

        Returns:
            ``dhidden``, which is g_out plus the gradient through the norm; empty where ``g_normed`` is None, because it
            is ``g_out``. ``dy``, which is the dropout of dhidden; empty where p is 0, because it is dhidden.
            ``dweight`` in the weight's dtype, summed in float32 over fixed blocks of rows in a fixed order.
        """
        return truth.residual_backward(g_out, g_normed, out, weight, rstd, dropout, need_dy, need_dweight)

    @_plain
    def act_dropout_forward(self, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout) -> Tensor:
        """Compute ``dropout(act(a))``, or ``dropout(act(a) * c)``.

        Args:
            a: [..., n].
            c: like a, or None.
            activation: a name of ``activations.ACTIVATIONS``.
            dropout: the dropout.
        """
        return truth.act_dropout_forward(a, c, activation, dropout)

    @_plain
    def act_dropout_backward(
        self, g: Tensor, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a and of c (empty without c), given the gradient g of the output."""
        return truth.act_dropout_backward(g, a, c, activation, dropout)

    @_plain
    def softmax_dropout_forward(
        self, scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute ``dropout(softmax(scores + bias + mask))``.

        Args:
            scores: [B, H, Lq, Lk].
            bias: floating, of any dtype, with at most four dimensions that can be broadcast to scores.
            mask: likewise; or bool, where False stands for -inf.
            dropout: the dropout of the probabilities.
            save: whether a backward will follow.

        Returns:
            The output in scores' dtype, and with ``save`` and p > 0 the probabilities before the dropout, likewise. A
            row that is -inf throughout has probabilities of 0.
        """
        return truth.softmax_dropout_forward(scores, bias, mask, dropout, save)

    @_plain
    def softmax_dropout_backward(self, g: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
        """Compute the gradient of scores, given g of the output and the probabilities before the dropout.

        With ``dp = dropout(g)`` it is ``p * (dp - sum(dp * p) / sum(p))``. The sum of p is 1 but for its rounding,
        which matters in half precision; where it is 0 the gradient is 0. The mean of dp is to be subtracted twice, so
        that its rounding does not count where one probability is nearly 1.
        """
        return truth.softmax_dropout_backward(g, probabilities, dropout)

    @_plain
    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scaling: float,
        dropout: Dropout,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute ``dropout(softmax(scaling * q k^T + bias + mask)) v``.

        This default multiplies by torch.matmul and calls the backend's own ``softmax_dropout_forward``.

        Args:
            q: [B, H, Lq, dk].
            k: [B, H, Lk, dk].
            v: [B, H, Lk, dv].
            bias: as in :meth:`softmax_dropout_forward`, as are ``mask`` and ``dropout``.
            scaling: the factor of the scores.
            save: whether a backward will follow.

        Returns:
            The output [B, H, Lq, dv] in q's dtype, which lies in memory as [B, Lq, H, dv]; and with ``save``, whatever
            p is, the probabilities [B, H, Lq, Lk] before the dropout, in q's dtype.
        """
        scores = torch.matmul(q, k.mT)
        if scaling != 1.0:
            scores = scores.mul_(scaling)
        weights, probabilities = self.softmax_dropout_forward(scores, bias, mask, dropout, save)
        out = truth.heads_inside(torch.matmul(weights, v))
        return out, weights if save and dropout.p == 0 else probabilities

    @_plain
    def attention_backward(
        self,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        probabilities: Tensor,
        scaling: float,
        dropout: Dropout,
        bias_shape: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of :meth:`attention_forward`.

        Args:
            g: [B, H, Lq, dv], the gradient of the output.
            q: as in the forward, as are ``k``, ``v``, ``scaling`` and ``dropout``.
            probabilities: what the forward saved.
            bias_shape: the shape of the bias; None where its gradient is not needed.

        Returns:
            dq, dk and dv, which lie in memory as [B, L, H, d]; and dbias of ``bias_shape``, in float32, empty where it
            is not needed.
        """
        dv = torch.matmul(self._dropped_probabilities(probabilities, dropout).mT, g)
        dscores = self.softmax_dropout_backward(torch.matmul(g, v.mT), probabilities, dropout)
        dbias = probabilities.new_empty(0, dtype=truth.accumulator_dtype(q.dtype))
        if bias_shape is not None:
            dbias = truth.attention_dbias(dscores, bias_shape)
        if scaling != 1.0:
            dscores = dscores.mul_(scaling)
        dq, dk = torch.matmul(dscores, k), torch.matmul(dscores.mT, q)
        return truth.heads_inside(dq), truth.heads_inside(dk), truth.heads_inside(dv), dbias

    def _dropped_probabilities(self, probabilities: Tensor, dropout: Dropout) -> Tensor:
        """dropout(probabilities), as the forward multiplied them with v. The default borrows relu, which leaves
        probabilities alone, so that the mask is made by the backend's own kernel."""
        if dropout.p == 0:
            return probabilities
        return self.act_dropout_forward(probabilities, None, "relu", dropout)

    @_plain
    def cross_entropy_forward(
        self, logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, need_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy of each row, and its gradient.

        Args:
            logits: [N, V].
            labels: int64 [N]. A value that is neither ``ignore_index`` nor one of 0 .. V-1 can occur on a GPU, where it
                is not checked, and gives NaN.
            label_smoothing: s, from 0 to 1.
            ignore_index: the label of the rows whose loss is 0.
            need_grad: whether the gradient is wanted.

        Returns:
            The float32 losses [N], ``(1 - s) * nll + s * mean over V of -log p``; and the gradient of their sum, like
            logits.
        """
        return truth.cross_entropy_forward(logits, labels, label_smoothing, ignore_index, need_grad)
