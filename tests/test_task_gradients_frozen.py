"""Each task's own gradient where a part of what makes the adapters is frozen, against a backward for each task.

All in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.t5s import TASKS, batch, tiny_model
from support.task_gradients import MIXED, gradients, loss_of, on_generators, on_tables, task_by_task

from hyperformer_fast.task_gradients import TaskGradients

#: What is frozen, as the ends or parts of parameters' names.
FROZEN = {
    "a stack": "hypernetworks.encoder.",
    "a generator": "hypernetworks.encoder.generator.",
    "biases": ".generator.bias",
    "weights": ".generator.weight",
    "norms": ".generator.norms",
    "embeddings": "task_embeddings.",
}
FROZEN_OF_A_TABLE = {"a stack": "hypernetworks.encoder.", "a task": ".adapters.cola", "norms": ".norms"}


def frozen(model, part):
    """Freeze the parameters with this part in their names, of which there are some."""
    names = [name for name, parameter in model.named_parameters() if part in name and parameter.requires_grad]
    assert names
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return model.train()


def expect_clipped_as_by_one_backward_for_each(model, vector):
    inputs = batch()
    tasks = task_by_task(model, inputs, MIXED)
    norms = {task: float(vector(found).norm()) for task, found in tasks.items()}
    limit = sum(sorted(norms.values())[-2:]) / 2  # the longest is cut
    watch = TaskGradients(model, max_norm=limit)
    with watch.attached():
        found = gradients(model, loss_of(model, inputs, MIXED))
    order = [TASKS.index(task) for task in tasks]
    np.testing.assert_allclose(watch.statistics.mean("norms")[order], list(norms.values()), rtol=1e-10)
    factors = {task: min(1.0, limit / norm) if norm else 1.0 for task, norm in norms.items()}
    assert min(factors.values()) < 0.999
    for name in found:
        if name.startswith(("hypernetworks", "task_embeddings")):
            expected = sum(each[name] * factors[task] for task, each in tasks.items())
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_is_no_part_of_a_gradient(part):
    # this variant's norms can be trained vectors
    model = tiny_model("hyperformer", add_layer_norm_before_adapter=True, conditional_layer_norm=False)
    expect_clipped_as_by_one_backward_for_each(frozen(model, part), on_generators)


@pytest.mark.parametrize("part", FROZEN_OF_A_TABLE.values(), ids=FROZEN_OF_A_TABLE)
def test_what_is_frozen_of_learned_adapters_is_no_part_of_a_gradient(part):
    expect_clipped_as_by_one_backward_for_each(frozen(tiny_model("adapters"), part), on_tables)


@pytest.mark.parametrize(
    ("variant", "said"), [("hyperformer++", "the generators are frozen"), ("adapters", "all adapters are frozen")]
)
def test_nothing_is_left_where_all_is_frozen(variant, said):
    model = frozen(tiny_model(variant), ".generator." if variant == "hyperformer++" else "hypernetworks.")
    with pytest.raises(ValueError, match=f"clipping the gradient of each task is impossible here: {said}"):
        TaskGradients(model, max_norm=1.0)


def test_frozen_generators_have_no_figures():
    """Also where they are frozen after the watch was made."""
    model = tiny_model().train()
    watch = TaskGradients(model)
    model.train_only_task_embeddings()
    for each in (watch, TaskGradients(model)):
        with each.attached():
            model(**batch(), task=MIXED).loss.backward()
        assert each.seen == 0 and each.statistics.figures(TASKS, meet=True) == {}
    assert next(iter(model.task_embeddings.task_to_embeddings.values())).grad.norm() > 0
