"""The public functions and the registered ops with every call forced to the Triton kernels; and the golden outputs."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.cases import random_packed
from support.golden import assert_golden
from support.public_ops import *  # noqa: F403
from test_official import CASES
from test_ops import static

from hyperformer_fast import backends
from hyperformer_fast.kernels import interpreter
from hyperformer_fast.layout import AdapterLayout


def test_every_call_is_forced():
    assert backends.current_backend() == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_fold(dtype):
    layout = AdapterLayout(13, 4, True, True)
    op = torch.ops.hyperformer_fast.fold.default
    torch.library.opcheck(op, (random_packed(layout, 6).view(2, 3, -1).float(), *static(layout)[:4], dtype))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_outputs_and_gradients(case):
    assert_golden(case, "triton")


def test_the_mend_notices_another_interpreter(monkeypatch):
    interpreter.check()
    for name, plain in interpreter.mend().items():
        if name in ("cast_impl", "create_dot"):
            with monkeypatch.context() as changed:
                changed.setattr(interpreter.interpreter.InterpreterBuilder, name, plain)
                with pytest.raises(RuntimeError, match="is not the one"):
                    interpreter.check()


def test_arithmetic_on_bfloat16_itself_is_an_error():
    with pytest.raises(Exception, match="convert to float32 first"):
        _doubled[(1,)](torch.ones(16, dtype=torch.bfloat16))


@triton.jit
def _doubled(A):
    i = tl.arange(0, 16)
    tl.store(A + i, tl.load(A + i) + tl.load(A + i))
