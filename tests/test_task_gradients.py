"""Each task's own gradient, read from one backward, against a backward for each task: norms, cosines, clipping, PCGrad.

All in float64.
"""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from support.t5s import TASKS, batch, tiny_config, tiny_model, tiny_t5
from support.task_gradients import (
    MIXED,
    behind_adapters,
    gradients,
    loss_of,
    on_generators,
    on_tables,
    stated_pcgrad,
    task_by_task,
)
from transformers import T5EncoderModel

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.task_gradients import (
    TaskGradients,
    clip_factors,
    gram_matrix,
    pcgrad_factors,
    pcgrad_order,
)
from hyperformer_fast.task_statistics import TaskStatistics, cosines

GENERATED = ("hyperformer++", "hyperformer-shared", "hyperformer")


@pytest.mark.parametrize("variant", GENERATED)
@pytest.mark.parametrize("changes", [{}, {"add_layer_norm_before_adapter": True, "conditional_layer_norm": False}])
def test_norms_and_cosines_are_those_of_a_backward_for_each_task(variant, changes):
    model = tiny_model(variant, **changes).train()
    inputs = batch()
    naive = [on_generators(g) for g in task_by_task(model, inputs, MIXED).values()]
    watch = TaskGradients(model)
    with watch.attached():
        loss_of(model, inputs, MIXED).backward()
    order = [TASKS.index(task) for task in dict.fromkeys(MIXED)]
    norms, similar = watch.statistics.mean("norms")[order], watch.statistics.mean("cosines")
    np.testing.assert_allclose(norms, [float(v.norm()) for v in naive], rtol=1e-10)
    expected = [[float(v @ u / v.norm() / u.norm()) for u in naive] for v in naive]
    found = similar[np.ix_(order, order)]
    off = ~np.eye(len(order), dtype=bool)
    np.testing.assert_allclose(found[off], np.array(expected)[off], rtol=1e-9, atol=1e-12)
    assert np.isnan(similar.diagonal()).all() and watch.seen == 1
    assert not (np.abs(found[off]) < 1e-6).any()  # a comparison with zeros would show nothing


@pytest.mark.parametrize("how", ["names", "index"])
def test_watching_changes_no_bit(how):
    model, inputs = tiny_model().train(), batch()
    asked = {"task": MIXED} if how == "names" else {"task_index": torch.tensor([TASKS.index(t) for t in MIXED])}
    expected = gradients(model, model(**inputs, **asked).loss)
    watch = TaskGradients(model)
    with watch.attached():
        loss = model(**inputs, **asked).loss
        assert all(torch.equal(g, expected[n]) for n, g in gradients(model, loss).items())
    assert model._task_gradients is None and watch.seen == 1
    # outside of the block, and without gradients or training, nothing is watched
    model(**inputs, **asked).loss.backward()
    with watch.attached():
        model.eval()(**inputs, **asked)
    assert watch.seen == 1


def test_tasks_given_as_numbers_are_those_given_by_name():
    """By number the weights of all tasks are generated; one that no sample has counts for nothing."""
    model, inputs, two = tiny_model().train(), batch(), ["cola", "mnli", "cola", "mnli"]
    figures = []
    for asked in ({"task": two}, {"task_index": torch.tensor([TASKS.index(t) for t in two])}):
        watch = TaskGradients(model, max_norm=1e-3)
        with watch.attached():
            model(**inputs, **asked).loss.backward()
        figures.append(watch.statistics.figures(TASKS, meet=True))
    assert math.isnan(figures[0]["gradient_norm/stsb"]) and figures[0]["clipped/cola"] == 1
    assert "gradient_cosine/mnli/cola" in figures[0] and "gradient_cosine/mnli/stsb" not in figures[0]
    assert figures[0] == pytest.approx(figures[1], rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("variant", [*GENERATED, "adapters"])
def test_each_task_is_clipped_by_itself(variant):
    model, inputs = tiny_model(variant).train(), batch()
    tasks = task_by_task(model, inputs, MIXED)
    vector = on_tables if variant == "adapters" else on_generators
    norms = {task: float(vector(found).norm()) for task, found in tasks.items()}
    limit = sum(sorted(norms.values())[1:]) / 2  # one is longer
    expected = {
        name: sum(found[name] * min(1.0, limit / norms[task]) for task, found in tasks.items())
        for name in behind_adapters(model)
        if name in tasks["mnli"]
    }
    watch = TaskGradients(model, max_norm=limit)
    with watch.attached():
        found = gradients(model, loss_of(model, inputs, MIXED))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    # what lies before the adapters' weights has the plain sum
    t5 = [name for name in found if name.startswith("t5.")]
    for name in t5:
        torch.testing.assert_close(found[name], sum(g[name] for g in tasks.values()), rtol=1e-9, atol=1e-12)
    assert len(t5) > 5 and np.nansum(watch.statistics.mean("clipped")) == 1


def test_both_stacks_count_in_one_norm():
    """The decoder's gradient comes first, and waits for the encoder's."""
    model, inputs = tiny_model().train(), batch()
    whole = on_generators(task_by_task(model, inputs, ["mnli"] * 4)["mnli"])
    watch = TaskGradients(model, max_norm=float(whole.norm()) / 2)
    with watch.attached():
        clipped = on_generators(gradients(model, loss_of(model, inputs, ["mnli"] * 4)))
    torch.testing.assert_close(clipped, whole / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", GENERATED)
@pytest.mark.parametrize("clips", [False, True])
def test_pcgrad_is_that_of_a_backward_for_each_task(variant, clips):
    model, inputs, wants = tiny_model(variant).train(), batch(), {"cola": -1.0}  # cola is to become worse
    tasks = task_by_task(model, inputs, MIXED, wants)
    vectors = [on_generators(found) for found in tasks.values()]
    limit = float(vectors[0].norm()) / 3 if clips else None
    if limit is not None:
        vectors = [v * min(1.0, limit / float(v.norm())) for v in vectors]
    assert float(vectors[0] @ vectors[1]) < 0  # there is a conflict to resolve
    changed = False
    for seed in range(3):
        watch = TaskGradients(model, max_norm=limit, surgery="pcgrad", seed=seed)
        with watch.attached():
            found = gradients(model, loss_of(model, inputs, MIXED, wants=wants))
        expected = stated_pcgrad(vectors, pcgrad_order(len(vectors), [seed, 0]))
        torch.testing.assert_close(on_generators(found), expected, rtol=1e-9, atol=1e-12)
        changed |= not torch.allclose(expected, sum(vectors), rtol=1e-3)
    assert changed
    for name in found:
        if name.startswith("t5."):
            torch.testing.assert_close(found[name], sum(g[name] for g in tasks.values()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("T", [2, 3, 9])
def test_pcgrad_of_any_number_of_tasks(T):
    vectors = torch.randn(T, 5, dtype=torch.float64)  # more than five in five dimensions conflict again and again
    order = pcgrad_order(T, [3, T])
    factors = pcgrad_factors(vectors @ vectors.T, torch.from_numpy(order))
    torch.testing.assert_close(factors @ vectors, stated_pcgrad(vectors, order))


def test_a_task_that_is_absent_conflicts_with_none():
    vectors = torch.randn(4, 3, dtype=torch.float64)
    vectors[2] = 0
    order = pcgrad_order(4, [1])
    without = [[j - (j > 2) for j in row if j != 2] for i, row in enumerate(order) if i != 2]
    factors = pcgrad_factors(vectors @ vectors.T, torch.from_numpy(order))
    assert factors.isfinite().all()
    torch.testing.assert_close(factors @ vectors, stated_pcgrad(vectors[[0, 1, 3]], without))


def test_orders_are_random_and_can_be_had_again():
    order = pcgrad_order(6, [1, 2])
    assert all(sorted([i, *row]) == list(range(6)) for i, row in enumerate(order))
    assert (order == pcgrad_order(6, [1, 2])).all() and (order != pcgrad_order(6, [1, 3])).any()
    seconds = {tuple(row) for draw in range(200) for row in pcgrad_order(3, [draw])[:1]}
    assert seconds == {(1, 2), (2, 1)}
    assert pcgrad_order(1, [0]).shape == (1, 0)


def test_a_gradient_that_is_not_finite_stays_so():
    factors = clip_factors(torch.tensor([2.0, 0.5, 0.0, math.inf, math.nan]), 1.0)
    assert factors[:3].tolist() == [0.5, 1.0, 1.0] and factors[3:].isnan().all()
    assert cosines(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_an_overflow_of_a_scaled_loss_is_no_part_of_the_figures():
    statistics = TaskStatistics(2)
    for gram in ([[4.0, 1.0], [1.0, 1.0]], [[math.inf, math.nan], [math.nan, 1.0]]):
        statistics.add(torch.tensor(gram), None, torch.tensor([True, False]))
    assert statistics.mean("norms").tolist() == [2, 1] and statistics.mean("clipped").tolist() == [1, 0]
    assert statistics.mean("cosines")[0, 1] == 0.5


def test_statistics_go_on_where_they_were_saved():
    grams = [torch.rand(2, 2).clamp_min(0.1) for _ in range(4)]
    whole, saved = TaskStatistics(2), TaskStatistics(2)
    for gram in grams[:2]:
        saved.add(gram, None, None)
    again = TaskStatistics(2)
    again.load(json.loads(json.dumps(saved.state())))
    for gram in grams:
        whole.add(gram, None, None)
    for gram in grams[2:]:
        again.add(gram, None, None)
    assert again.state() == whole.state()


def test_a_scaled_loss_is_clipped_as_if_it_were_not():
    model, inputs = tiny_model().train(), batch()
    plain = gradients(model, loss_of(model, inputs, MIXED))
    limit = float(on_generators(plain).norm()) / 4
    found, norms = [], []
    for scale in (1.0, 1024.0):
        watch = TaskGradients(model, max_norm=limit)
        watch.scale = scale
        with watch.attached():
            found.append(on_generators(gradients(model, loss_of(model, inputs, MIXED) * scale)) / scale)
        norms.append(watch.statistics.mean("norms"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-9)


def test_gradient_checkpointing_is_seen_through():
    model, inputs = tiny_model().train(), batch()
    figures = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        watch = TaskGradients(model, surgery="pcgrad")
        with watch.attached():
            loss_of(model, inputs, MIXED).backward()
        figures.append(watch.statistics.figures(TASKS, meet=True))
        assert watch.seen == 1
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)


def test_a_backward_under_autocast_rounds_no_figure():
    model = tiny_model(t5=tiny_t5(dtype=torch.float32)).train()
    norms = []
    for autocast in (False, True):
        watch = TaskGradients(model)
        packed = watch.generate(dict(model.hypernetworks.items()), model.task_embeddings(), None)
        factors = [torch.linspace(0.1, 1, weights.numel()).view_as(weights) for weights in packed.values()]
        loss = sum((weights * factor).sum() for weights, factor in zip(packed.values(), factors, strict=True))
        with torch.autocast("cpu", enabled=autocast):
            loss.backward()
        norms.append(watch.statistics.mean("norms"))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)


def test_a_stack_that_does_not_run_counts_for_nothing():
    model, inputs = tiny_model().train(), batch()
    states = torch.randn(4, 7, 32, dtype=torch.float64)
    watch = TaskGradients(model, surgery="pcgrad", max_norm=1e-3)
    with watch.attached():
        out = model(encoder_outputs=(states,), labels=inputs["labels"], task=MIXED)
        found = gradients(model, out.loss)
    assert watch.seen == 1 and found["hypernetworks.decoder.generator.weight"].norm() > 0
    assert found["hypernetworks.encoder.generator.weight"].norm() == 0
    alone = get_hyperformer_model(T5EncoderModel(tiny_t5().config).double(), tiny_config()).train()
    watch = TaskGradients(alone, surgery="pcgrad")
    with watch.attached():
        alone(input_ids=inputs["input_ids"], task=MIXED).last_hidden_state.square().sum().backward()
    assert watch.seen == 1 and (watch.statistics.mean("norms") > 0).all()


def test_the_norms_that_all_tasks_share_are_where_adapters_meet():
    """Variant "adapters": each task has its projections, and all share a site's norms."""
    model, inputs = tiny_model("adapters").train(), batch()
    tasks = task_by_task(model, inputs, MIXED)
    vectors = [on_tables(found) for found in tasks.values()]
    watch = TaskGradients(model)
    with watch.attached():
        loss_of(model, inputs, MIXED).backward()
    order = [TASKS.index(task) for task in tasks]
    np.testing.assert_allclose(watch.statistics.mean("norms")[order], [float(v.norm()) for v in vectors], rtol=1e-10)
    found = watch.statistics.mean("cosines")[order[0], order[1]]
    assert found == pytest.approx(float(torch.cosine_similarity(vectors[0], vectors[1], dim=0)), rel=1e-9)


SHARING = {"mnli": "both", "stsb": "own", "cola": "both"}


@pytest.mark.parametrize("changes", [{}, {"add_layer_norm_after_adapter": False}], ids=["norms", "no norms"])
@pytest.mark.parametrize("clips", [False, True])
def test_tasks_that_share_adapters_conflict_in_them(changes, clips):
    """Variant "adapters" with ``task_to_embeddings``: norms, cosines, clipping and PCGrad by a backward for each."""
    model, inputs = tiny_model("adapters", task_to_embeddings=SHARING, **changes).train(), batch()
    wants = {"cola": -1.0}  # cola is to become worse
    tasks = task_by_task(model, inputs, MIXED, wants)
    vectors = [on_tables(found) for found in tasks.values()]
    order = [TASKS.index(task) for task in tasks]
    expected = torch.stack([v / v.norm() for v in vectors])
    expected = expected @ expected.T
    shared = list(tasks).index("mnli"), list(tasks).index("cola")
    assert expected[shared] < -0.01  # there is a conflict to resolve
    limit = float(vectors[0].norm()) / 3 if clips else None
    if limit is not None:
        vectors = [v * min(1.0, limit / float(v.norm())) for v in vectors]
    changed = False
    for seed in range(3):
        watch = TaskGradients(model, max_norm=limit, surgery="pcgrad", seed=seed)
        with watch.attached():
            found = gradients(model, loss_of(model, inputs, MIXED, wants=wants))
        similar = watch.statistics.mean("cosines")[np.ix_(order, order)]
        off = ~np.eye(len(order), dtype=bool)
        np.testing.assert_allclose(similar[off], expected.numpy()[off], rtol=1e-9, atol=1e-12)
        stated = stated_pcgrad(vectors, pcgrad_order(len(vectors), [seed, 0]))
        torch.testing.assert_close(on_tables(found), stated, rtol=1e-9, atol=1e-12)
        changed |= not torch.allclose(stated, sum(vectors), rtol=1e-3)
    assert changed
    everyone = TaskGradients(model)
    with everyone.attached():  # by number, every task has weights, one that no sample has among them
        index = torch.tensor([TASKS.index(task) for task in ("mnli", "cola", "mnli", "cola")])
        model(**inputs, task_index=index).loss.backward()
    two = task_by_task(model, inputs, ["mnli", "cola", "mnli", "cola"])
    cosine = torch.cosine_similarity(*(on_tables(each) for each in two.values()), dim=0)
    assert everyone.statistics.mean("cosines")[0, 2] == pytest.approx(float(cosine), rel=1e-9)


def test_what_makes_no_sense_is_refused():
    model = tiny_model()
    for arguments, message in [
        ({"max_norm": 0.0}, "max_norm must be above 0 and finite, or None"),
        ({"max_norm": math.inf}, "max_norm must be above 0"),
        ({"surgery": "pc"}, "surgery must be one of none, pcgrad, got 'pc'"),
    ]:
        with pytest.raises(ValueError, match=message):
            TaskGradients(model, **arguments)
    with pytest.raises(ValueError, match="each task has adapters of its own here, and tasks share no more"):
        TaskGradients(tiny_model("adapters"), surgery="pcgrad")
    own = {task: f"of {task}" for task in TASKS}
    with pytest.raises(ValueError, match="each task has adapters of its own here"):
        TaskGradients(tiny_model("adapters", task_to_embeddings=own), surgery="pcgrad")
    with pytest.raises(ValueError, match="the model has one task only"):
        TaskGradients(tiny_model(tasks=["mnli"]), surgery="pcgrad")
    finetuning = get_hyperformer_model(tiny_t5(), tiny_config("finetuning"))
    with pytest.raises(ValueError, match='variant "finetuning" has no adapters'):
        TaskGradients(finetuning, max_norm=1.0)
    with TaskGradients(finetuning).attached():  # nothing to see, nothing in the way
        finetuning.train()(**batch(), task=MIXED).loss.backward()
    model.train_only_task_embeddings()
    with pytest.raises(ValueError, match="the generators are frozen"):
        TaskGradients(model, surgery="pcgrad")


def test_copies_of_a_watched_model_are_models():
    model = tiny_model().train()
    with TaskGradients(model).attached():
        twin = copy.deepcopy(model)
    twin(**batch(), task=MIXED).loss.backward()


def test_gram_matrices_of_any_layout():
    """Two generators of three sites each, with norms that all tasks share behind the generated numbers."""
    Q, S, T, P, R, k = 2, 6, 3, 7, 4, 5
    dpacked, e = torch.randn(S, T, P, dtype=torch.float64), torch.randn(Q, S // Q * T, k, dtype=torch.float64)
    with_bias = torch.cat([e, torch.ones_like(e[..., :1])], -1).view(Q, S // Q, T, k + 1)
    d = dpacked.view(Q, S // Q, T, P)
    weights = torch.einsum("qstr,qstk->tqrk", d[..., :R], with_bias).flatten(1)
    norms = d[..., R:].sum(1).transpose(0, 1).flatten(1)
    vectors = torch.cat([weights, norms], 1)
    torch.testing.assert_close(gram_matrix(dpacked, e, R), vectors @ vectors.T)
    assert gram_matrix(dpacked.bfloat16(), e.bfloat16(), R).dtype == torch.float32
