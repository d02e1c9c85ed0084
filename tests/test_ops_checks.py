"""What the ops refuse, and how they say so."""

from __future__ import annotations

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import ops
from hyperformer_fast.layout import AdapterLayout


def fold_of_other_norms():
    layout = AdapterLayout(8, 2, post_norm=False)
    return ops.fold(random_packed(layout, 2).float(), layout, torch.float32)


BAD = {
    "width": (lambda a: a | {"x": torch.randn(5, 3, 7)}, r"\[\.\.\., 8\].*\[5, 3, 7\]"),
    "integer x": (lambda a: a | {"x": torch.ones(5, 3, 8, dtype=torch.int64)}, "floating.*int64"),
    "scalar x": (lambda a: a | {"x": torch.tensor(1.0)}, "scalar"),
    "packed length": (lambda a: a | {"packed": a["packed"][:, :-1]}, r"P = \d+.*got \d+"),
    "packed dims": (lambda a: a | {"packed": a["packed"][0]}, r"\[T, P\]"),
    "no index for several tasks": (lambda a: a | {"task_index": None}, "T = 2.*task_index"),
    "index dtype": (lambda a: a | {"task_index": a["task_index"].float()}, "int32 or int64.*float32"),
    "index length": (lambda a: a | {"task_index": torch.tensor([0, 1])}, "5, got 2"),
    "index dims": (lambda a: a | {"task_index": torch.zeros(5, 3, dtype=torch.int64)}, r"\[B\].*\[5, 3\]"),
    "task too high": (lambda a: a | {"task_index": torch.tensor([0, 1, 2, 0, 0])}, "to 1, got 2"),
    "task too low": (lambda a: a | {"task_index": torch.tensor([0, 1, -2, 0, 0])}, "from -1.*got -2"),
    "device": (lambda a: a | {"packed": a["packed"].to("meta")}, "device cpu, got meta"),
    "activation": (lambda a: a | {"activation": "tanh"}, "gelu_new.*'tanh'"),
    "no name of an activation": (lambda a: a | {"activation": ["relu"]}, r"gelu_new.*\['relu'\]"),
    "impl": (lambda a: a | {"impl": "gpu"}, "impl: backend must be one of auto, .*got 'gpu'"),
    "folded for another dtype": (
        lambda a: a | {"folded": ops.fold(a["packed"], a["layout"], torch.float16)},
        r"folded.wd must be \[2, 2, 8\] in torch.float32 .*got \[2, 2, 8\] in torch.float16",
    ),
    "folded of another site": (
        lambda a: a | {"folded": ops.fold(a["packed"][:1], a["layout"], torch.float32)},
        r"folded.wd must be \[2, 2, 8\].*got \[1, 2, 8\]",
    ),
    # wd and wg are the same with and without a post-norm: kernels would read beyond the others' end
    "folded for other norms": (
        lambda a: a | {"folded": fold_of_other_norms()},
        r"folded.vectors must be \[2, 18\].*got \[2, 10\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(what, grad):
    layout = AdapterLayout(8, 2)
    good = {
        "x": torch.randn(5, 3, 8),
        "packed": random_packed(layout, 2).float().requires_grad_(grad),
        "layout": layout,
        "activation": "gelu_new",
        "task_index": torch.tensor([0, 1, -1, 0, 1]),
    }
    ops.adapter(**good)
    change, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        ops.adapter(**change(good))


def test_bad_generators_are_named():
    E, G, g0 = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5)
    for arguments, message in (
        ((E[0], G, g0), r"E must be \[Q, n, k\].*\[3, 4\]"),
        ((E[:1], G, g0), "agree in Q and k"),
        ((E, G, g0[:, :4]), r"g0 must be \[Q, P\]"),
        ((E, G.double(), g0), "G must have E's dtype.*float64"),
        ((E.long(), G.long(), g0.long()), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.generate_weights(*arguments)
    layout = AdapterLayout(8, 2)
    x, E, G, g0 = torch.randn(5, 8), torch.randn(1, 4), torch.randn(layout.numel, 4), torch.randn(layout.numel)
    for arguments, message in (
        ((x[:, :7], E, G, g0), r"\[\.\.\., 8\].*\[5, 7\]"),
        ((x, E[0], G, g0), r"E must be \[T, k\]"),
        ((x, E, G[:-1], g0[:-1]), rf"P = {layout.numel} rows.*got {layout.numel - 1}"),
        ((x, E.expand(2, 4), G, g0), "T = 2.*task_index"),
        ((x, E[:, :3], G, g0), "agree in Q and k"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.hyper_adapter(*arguments, layout, "gelu_new")
