"""These tests run the Triton kernels on a CPU, in a process of their own: Triton reads TRITON_INTERPRET when a kernel
is decorated. ``tests/test_triton_backend.py`` starts them; to run one by hand, set the variable, and
HYPERFORMER_FAST_BACKEND=triton.
"""

import os
from functools import partial
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    _patch_and_call = interpreter.InterpretedFunction.__call__

    def _call(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("hyperformer_fast.")
        return (self.rewrite() if ours else partial(_patch_and_call, self))(*args, **kwargs)

    # Triton patches its language again at each call of a device function, though a launch of ours has: half the time.
    interpreter.InterpretedFunction.__call__ = _call
    # Nor is every 32-bit sum checked for an overflow; test_rows_far_apart looks where one could be.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

#: Of tests written for quick backends, every n-th combination: the interpreter takes seconds for each.
EVERY = {
    "test_opcheck_adapter": 3,
    "test_hyper_adapter_is_its_parts": 3,
    "test_adapter_residual_is_its_parts": 8,
    "test_compiles_in_one_graph_to_the_same_bits": 3,
    **dict.fromkeys(
        (
            "test_sites_in_any_order_twice_or_never",
            "test_sites_with_rows_of_their_own",
            "test_an_input_without_rows",
            "test_inputs_of_two_dtypes",
            "test_several_backward_passes_over_one_graph",
            "test_a_part_of_the_graph_after_the_whole",
            "test_a_backward_that_fails_leaves_nothing",
            "test_each_site_in_a_checkpoint_of_its_own",
            "test_hooks_see_whole_gradients",
            "test_anomaly_detection",
            "test_saved_tensors_elsewhere",
            "test_one_of_the_gradients_alone",
            "test_without_gradients_first",
            "test_threads",
            "test_compiled",
        ),
        2,
    ),
}


def pytest_collection_modifyitems(items):
    seen = dict.fromkeys(EVERY, 0)
    for item in list(items):
        name = getattr(item, "originalname", None)
        if item.path.parent == Path(__file__).parent and name in seen:
            if seen[name] % EVERY[name]:
                items.remove(item)
            seen[name] += 1
