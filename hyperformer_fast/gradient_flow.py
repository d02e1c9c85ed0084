"""Whether gradients flow through a T5, which a quantised one may cut without an error."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: Why a T5 that cuts gradients is refused, and what to do; follows what cuts them.
CANNOT_TRAIN = (
    "as in one under torch's dynamic int8 quantisation, so that the adapters would not learn what they should: train "
    "on a T5 in floating point, or quantised by torchao (weights only) or bitsandbytes (in 4 bits on a CPU as long as "
    "it has not run in eval() mode), or run it under torch.no_grad()"
)


def expect_gradients(out: Any) -> None:
    """RuntimeError where the autograd graph of a T5's output, its loss if it has one, ends in an operator that has no
    derivative (torch itself warns at the backward, and goes on)."""
    first = out["loss"] if isinstance(out, dict) and out.get("loss") is not None else out[0]
    if not first.requires_grad:
        raise RuntimeError(f"no gradient flows through the head of this T5, {CANNOT_TRAIN}")
    if _has_cut(first):
        raise RuntimeError(f"no gradient flows through some operator of this T5, {CANNOT_TRAIN}")


def _has_cut(tensor: Tensor) -> bool:
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "NotImplemented" in node.name():  # its name says no more, not even the operator's
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
