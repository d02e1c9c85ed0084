"""The tests of the ops that any backend must pass when every call is forced to it: import all of them."""

from test_ops import (
    test_any_number_of_rows,
    test_autocast_changes_nothing,
    test_nan_propagates,
    test_several_tasks_equal_one_by_one,
    test_stride_zero_gradient,
    test_the_forward_goes_on_from_the_z_that_it_keeps,
    test_zero_samples_with_tasks,
)
from test_registered_ops import (
    test_compiles_in_one_graph_to_the_same_bits,
    test_hyper_adapter_is_its_parts,
    test_inference_saves_nothing,
    test_opcheck_adapter,
    test_opcheck_generate,
    test_second_derivatives_are_refused,
    test_training_saves_only_x_z_and_r,
)

__all__ = [
    "test_any_number_of_rows",
    "test_autocast_changes_nothing",
    "test_compiles_in_one_graph_to_the_same_bits",
    "test_hyper_adapter_is_its_parts",
    "test_inference_saves_nothing",
    "test_nan_propagates",
    "test_opcheck_adapter",
    "test_opcheck_generate",
    "test_second_derivatives_are_refused",
    "test_several_tasks_equal_one_by_one",
    "test_stride_zero_gradient",
    "test_the_forward_goes_on_from_the_z_that_it_keeps",
    "test_training_saves_only_x_z_and_r",
    "test_zero_samples_with_tasks",
]
