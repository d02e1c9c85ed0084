"""The public functions and the registered ops with every call forced to the emulated CUDA kernels; and the golden
outputs."""

from __future__ import annotations

import pytest
import torch
from support.emulated import needs_compiler, registered
from support.golden import assert_golden
from support.public_ops import *  # noqa: F403
from test_official import CASES
from test_ops import op_arguments, static

from hyperformer_fast import backends, explain
from hyperformer_fast.layout import AdapterLayout

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def _forced():
    with registered(), backends.use_backend("cuda-emulated"):
        yield


@pytest.mark.parametrize("op", ["generate_weights", "fold", "adapter_forward", "adapter_backward", "hyper_adapter"])
def test_it_serves_every_op(op):
    assert explain(op, torch.randn(3, 40)).chosen == "cuda-emulated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_fold(dtype):
    layout = AdapterLayout(13, 4, True, True)
    _, packed, _, _ = op_arguments(layout, grad=False)
    torch.library.opcheck(torch.ops.hyperformer_fast.fold.default, (packed, *static(layout)[:4], dtype))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_outputs_and_gradients(case):
    assert_golden(case, "cuda-emulated")
