"""The public functions of the pieces with the Triton kernels: the tests and the sweeps of the other backends."""

from __future__ import annotations

import os

import pytest
from support.watch import watch

os.environ.setdefault("HYPERFORMER_FAST_PIECES_EXAMPLES", "10")  # an example takes a tenth of a second

from test_pieces import test_adapter_residual_is_its_parts, test_any_shape, use  # noqa: F401
from test_pieces_attention import (  # noqa: F401
    test_attention_of_any_shape,
    test_the_attentions_gradients_do_not_cancel,
    test_the_losss_gradient_does_not_cancel,
    test_the_softmaxs_gradient_does_not_cancel,
)
from test_pieces_masks import (  # noqa: F401
    test_masks_are_the_same_everywhere,
    test_rows_that_are_masked_out_wholly,
)
from test_pieces_sweep import (  # noqa: F401
    test_sweep_act_dropout,
    test_sweep_attention,
    test_sweep_cross_entropy,
    test_sweep_residual,
    test_sweep_rms_norm,
    test_sweep_softmax,
)


@pytest.fixture(autouse=True)
def _watched():
    with watch():
        yield
