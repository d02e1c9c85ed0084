"""The public functions and the registered ops with every call forced to the emulated CUDA kernels; and the golden
outputs."""

from __future__ import annotations

import pytest
import torch
from support.emulated import needs_compiler, registered
from support.golden import assert_golden
from test_official import CASES
from test_ops import (  # noqa: F401
    op_arguments,
    static,
    test_any_number_of_rows,
    test_autocast_changes_nothing,
    test_compiles_in_one_graph_to_the_same_bits,
    test_hyper_adapter_is_its_parts,
    test_inference_saves_nothing,
    test_nan_propagates,
    test_opcheck_adapter,
    test_opcheck_generate,
    test_second_derivatives_are_refused,
    test_several_tasks_equal_one_by_one,
    test_stride_zero_gradient,
    test_the_forward_goes_on_from_the_z_that_it_keeps,
    test_training_saves_only_x_z_and_r,
    test_zero_samples_with_tasks,
)

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
