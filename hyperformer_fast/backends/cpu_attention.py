"""Attention and the loss on the CPU: the raw ops of csrc/cpu/attention_bindings.cpp as methods of a backend."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import t5_reference as truth
from ..layout import Dropout
from .pieces import PieceKernels

#: What these kernels serve.
ATTENTION_OPS = (
    "softmax_dropout_forward",
    "softmax_dropout_backward",
    "attention_forward",
    "attention_backward",
    "cross_entropy_forward",
)


class CpuAttention(PieceKernels, abc.ABC):
    """The part of the backend ``cpu`` that computes attention and the loss.

    Attention is one kernel each way, which takes a head at a time: the scores, and the probabilities after the dropout,
    stay in the cache. q, k, v and the output's gradient are read in place where their last dimension is contiguous.
    """

    @abc.abstractmethod
    def library(self) -> Any:
        """The raw ops."""

    def softmax_dropout_forward(
        self, scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool
    ) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = self.library().softmax_dropout_forward(
            scores, _readable(bias), _readable(mask), *dropout, save
        )
        return results

    def softmax_dropout_backward(self, g: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
        dscores: Tensor = self.library().softmax_dropout_backward(g, probabilities.contiguous(), *dropout)
        return dscores

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
        results: tuple[Tensor, Tensor] = self.library().attention_forward(
            q, k, v, _readable(bias), _readable(mask), scaling, *dropout, save
        )
        return results

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
        dq, dk, dv, dscores = self.library().attention_backward(
            g, q, k, v, probabilities.contiguous(), scaling, *dropout, bias_shape is not None
        )
        if bias_shape is None:
            return dq, dk, dv, dscores.new_empty(0, dtype=torch.float32)
        return dq, dk, dv, truth.attention_dbias(dscores, bias_shape)

    def cross_entropy_forward(
        self, logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, need_grad: bool
    ) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = self.library().cross_entropy_forward(
            logits, labels, label_smoothing, ignore_index, need_grad
        )
        return results


def _readable(term: Tensor | None) -> Tensor | None:
    """A bias or mask in a dtype that the kernels read."""
    return term.float() if term is not None and term.dtype == torch.float64 else term
