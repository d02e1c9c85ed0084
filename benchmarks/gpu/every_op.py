"""Run every op of a backend once, for compute-sanitizer to look at: ``python -m gpu.every_op DEVICE BACKEND``."""

from __future__ import annotations

import sys

import torch

from hyperformer_fast import backends, ops
from hyperformer_fast.layout import AdapterLayout, Dropout


def every_op(device: str, backend: str) -> None:
    """All kernels, with mixed tasks, ragged rows, many rows and few."""
    with backends.use_backend(backend):
        for dtype, d, b, pre in ((torch.bfloat16, 768, 24, False), (torch.float32, 97, 5, True)):
            layout = AdapterLayout(d, b, pre)
            shapes = (1, 3, 64), (1, layout.numel, 64), (1, layout.numel)
            E, G, g0 = (torch.randn(shape, device=device) for shape in shapes)
            packed = ops.generate_weights(E, G, g0)[0].requires_grad_()
            index = torch.tensor([2, -1, 0, 2], device=device)
            for L in (33, 1):
                x = torch.randn(4, L, d, device=device).to(dtype).requires_grad_()
                out = ops.adapter(x, packed, layout, "gelu_new", task_index=index)
                torch.autograd.grad(out, (x, packed), torch.ones_like(out))
                ops.hyper_adapter(x, E[0], G[0], g0[0], layout, "gelu_new", index)
                pieces(x)
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def pieces(x: torch.Tensor) -> None:
    """What lies between a T5's matrix products, for a stream x [B, L, d]."""
    dropout = Dropout(0.1, torch.tensor([3], device=x.device), 1)
    weight = torch.ones(x.shape[-1], device=x.device, requires_grad=True)
    out, normed = ops.residual(x, x.clone(), dropout, weight)
    out, normed = ops.residual(out, ops.act_dropout(normed.to(x.dtype), "gelu_new", out, dropout), dropout, weight)
    last = ops.rms_norm(ops.residual(out, x, dropout), weight).to(x.dtype).unflatten(-1, (1, -1)).transpose(1, 2)
    attended = ops.attention(last, last, last, mask=torch.ones(1, 1, 1, x.shape[1], device=x.device), dropout=dropout)
    logits = attended.flatten(0, 2)
    labels = torch.arange(len(logits), device=x.device) % logits.shape[1]
    loss = ops.cross_entropy_rows(logits, labels, 0.1).sum() + normed.sum()
    torch.autograd.grad(loss, (x, weight))


if __name__ == "__main__":
    every_op(*sys.argv[1:])
