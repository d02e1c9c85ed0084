"""Weights that are kept between forwards in evaluation: they save the generation, and change no answer.

test_prepared_changes.py: they are never stale. test_prepared_compiled.py: they and torch.compile.
"""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from support.prepared import MIXED, close, count_generated, count_ops, logits, prepared_bytes, truth, within_data
from support.t5s import TASKS, VARIANTS, batch, tiny_config, tiny_model, tiny_t5

from hyperformer_fast import get_hyperformer_model, prepared, stamp
from hyperformer_fast.backends import use_backend
from hyperformer_fast.forward_weights import context_of


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()


@pytest.fixture
def generated(monkeypatch):
    """Counts the stacks whose weights were generated."""
    return count_generated(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_answers_are_the_same(variant, dtype):
    model = tiny_model(variant, tiny_t5(dtype=dtype)).eval()
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for task in ("stsb", MIXED, "mnli", ["cola"] * 4, MIXED):
        torch.testing.assert_close(logits(model, task), truth(model, task), **tolerance)
    assert prepared_bytes(model) > 0
    index = torch.tensor([0, 2, -1, 1])
    with torch.no_grad():
        kept = model(**batch(), task_index=index).logits
    torch.testing.assert_close(kept, model(**batch(), task_index=index).logits.detach(), **tolerance)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("blocks", [False, True], ids=["norms alone", "adapters"])
def test_other_layouts_of_adapters(blocks, pre_norm):
    changes = {"train_adapters_blocks": blocks, "add_layer_norm_before_adapter": pre_norm}
    model = tiny_model(t5=tiny_t5(dtype=torch.float32), **changes).eval()
    for task in ("stsb", MIXED):
        close(logits(model, task), truth(model, task))
    assert prepared_bytes(model) > 0


def test_nothing_is_generated_after_the_first_forward(model, generated):
    for task in TASKS:
        logits(model, task)
    first = len(generated)
    for task in (*TASKS, MIXED, MIXED[::-1]):
        logits(model, task)
    with torch.inference_mode():
        model(**batch(), task_index=torch.tensor([1, -1, 0, 2]))
    model.generate(batch()["input_ids"], task=MIXED, max_new_tokens=3)
    assert len(generated) == first
    logits(model.train().eval())
    assert len(generated) > first


def what_a_user_runs(model):
    """Forwards and generations of the tasks in a first batch, in several ways."""
    ids = batch()["input_ids"]
    for task in (MIXED, MIXED[::-1], "cola", ["stsb"] * len(MIXED)):
        logits(model, task)
        model.generate(ids, task=task, max_new_tokens=3)
    model.generate(ids, task=MIXED, max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "not kept"])
def test_the_ops_that_make_weights_run_in_the_first_forward_alone(model, monkeypatch, keeps):
    if not keeps:  # the count must show it
        monkeypatch.setattr(prepared.PreparedWeights, "find", lambda *args: None)
    counts = count_ops(monkeypatch)
    logits(model, MIXED)
    first = dict(counts)
    assert all(first.values())
    what_a_user_runs(model)
    assert (counts == first) is keeps
    if not keeps:
        assert counts["generate_weights"] == first["generate_weights"] * 10  # a forward or a generation each


def test_a_task_has_the_same_bits_whatever_else_is_kept(model):
    if prepared.choice.explain("generate_weights").chosen != "cpu":
        pytest.skip("the compiled library is not there, and PyTorch's products round by the number of rows")
    alone = logits(model, "cola")
    logits(model, "mnli")
    assert torch.equal(logits(model, "cola"), alone)
    model.prepare()
    assert torch.equal(logits(model, "cola"), alone)


def test_tasks_join_those_that_are_kept(model, generated):
    model = tiny_model(t5=tiny_t5(dtype=torch.float32), tasks=[f"task {i}" for i in range(40)]).eval()
    for task in model.hyperformer_config.tasks:
        logits(model, task)
    assert len(generated) == 2 * 7  # for 1, 2, 4 ... 32 and 40 tasks in each of the two stacks
    assert model.memory_footprint().prepared_tasks == 40


def test_only_the_tasks_asked_for_are_kept(model):
    logits(model, "cola")
    assert model.memory_footprint().prepared_tasks == 1
    model.prepare(["mnli", "cola"])
    found = model.memory_footprint()
    assert found.prepared_tasks == 2
    assert found.total == sum(found[:4]) and found.prepared_per_task * 2 == found.prepared


def test_automatic_keeping_stops_at_its_limit(model, monkeypatch, generated):
    net = model.hypernetworks["encoder"]
    of_one = 8 * net.layout.numel * (net.num_sites + model.hypernetworks["decoder"].num_sites)
    monkeypatch.setattr(prepared, "MOST_BYTES", 2 * of_one)
    for task in (*TASKS, MIXED):
        close(logits(model, task), truth(model, task))
        assert prepared_bytes(model) <= 4 * of_one and model.memory_footprint().prepared_tasks <= 2
    model.prepare()
    generated.clear()
    close(logits(model, MIXED), truth(model, MIXED))
    assert len(generated) == 2  # by the truth


def test_gradients_flow_in_evaluation(model):
    logits(model)
    loss = model(**batch(), task="stsb").loss
    loss.backward()
    assert all(p.grad is not None for p in model.hypernetworks.parameters())


def test_a_frozen_model_keeps_weights_with_gradients_on(model, generated):
    model.requires_grad_(False)
    expected = truth(model)
    generated.clear()
    embedded = model.get_input_embeddings()(batch()["input_ids"]).requires_grad_()
    with torch.inference_mode():  # what is kept from here must serve a backward, too
        model(**batch(), task="stsb")
    kept = len(generated)
    inputs = {**batch(), "inputs_embeds": embedded}
    del inputs["input_ids"]
    out = model(**inputs, task="stsb")
    close(out.logits.detach(), expected)
    out.loss.backward()
    assert embedded.grad is not None and len(generated) == kept


def test_training_frees_what_is_kept(model):
    logits(model)
    assert prepared_bytes(model) > 0
    model.train()
    assert prepared_bytes(model) == 0
    with pytest.raises(RuntimeError, match="in training mode: call eval"):
        model.prepare()
    model.eval().prepare()
    model.to(torch.float64)
    assert prepared_bytes(model) == 0


@pytest.fixture
def uncollected():
    """Python looks for no cycles, so that what is part of one stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def asked_in_every_way(model, names):
    for name in (names[0], (MIXED[:2] + names * 2)[:4]):
        logits(model, name)
    model.generate(batch()["input_ids"], task=names[0], max_new_tokens=2)


@pytest.mark.parametrize(("variant", "blocks"), [*((each, True) for each in VARIANTS), ("hyperformer", False)])
@pytest.mark.usefixtures("uncollected")
def test_what_is_replaced_is_freed_at_once(variant, blocks):
    """Python looks for cycles by the number of objects, so that gigabytes may come first."""
    config = tiny_config(variant, train_adapters_blocks=blocks)
    model = get_hyperformer_model(tiny_t5(dtype=torch.float32), config).eval()
    asked_in_every_way(model, TASKS)
    kept = model._prepared._entry
    assert kept is not None
    kept = [weakref.ref(kept), *(weakref.ref(stack.packed) for stack in kept.stacks.values())]
    model.add_task("new", init_from="cola")
    logits(model, "new")
    assert [each() for each in kept] == [None] * len(kept)


def tensors_alive() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("variant", ["hyperformer++", "adapters"])
@pytest.mark.usefixtures("uncollected")
def test_tasks_that_come_and_go_leave_nothing(variant):
    model = get_hyperformer_model(tiny_t5(dtype=torch.float32), tiny_config(variant)).eval()

    def come_and_go(times):
        for _ in range(times):
            model.add_task(f"new {next(number)}", init_from="cola")
            asked_in_every_way(model, [model.hyperformer_config.tasks[-1], "stsb"])
            model.remove_task(model.hyperformer_config.tasks[-1])
            asked_in_every_way(model, TASKS)
        return tensors_alive()

    number = itertools.count()
    before = come_and_go(1)
    stamps = len(stamp._watched)
    assert come_and_go(3) == before
    assert len(stamp._watched) == stamps


def test_one_set_of_weights_for_each_dtype(model):
    model.prepare()
    once = prepared_bytes(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, MIXED)
    both = prepared_bytes(model)
    assert once < both < 2 * once
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, MIXED)
    logits(model, MIXED)
    assert prepared_bytes(model) == both


def test_the_backend_asked_for_makes_the_weights(model, generated):
    logits(model)
    generated.clear()
    with use_backend("reference"):
        first = logits(model)
        close(first, truth(model))
    assert generated[0] == "forward_each"
    close(logits(model), first)


def test_copies_and_pickles_hold_nothing(model):
    expected = logits(model, MIXED)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert prepared_bytes(twin) == 0
        assert torch.equal(logits(twin, MIXED), expected)
        within_data(twin)
        assert not torch.allclose(logits(twin, MIXED), expected)
    assert torch.equal(logits(model, MIXED), expected)


def test_unknown_tasks_and_none_are_refused(model):
    with pytest.raises(ValueError, match="unknown task"):
        model.prepare("nothing")
    with pytest.raises(ValueError, match="at least one task, got none"):
        model.prepare([])


def test_threads_with_tasks_of_their_own(model):
    expected = {task: truth(model, task) for task in TASKS}
    wrong, barrier = [], threading.Barrier(len(TASKS))
    inputs = batch()  # which seeds the generator that all threads share

    def serve(task):
        barrier.wait()
        for _ in range(6):
            got = logits(model, task, **inputs)
            if not torch.allclose(got, expected[task], rtol=1e-4, atol=1e-4):
                wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(model, beams):
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 5, "num_beams": beams}
    together = model.generate(ids, task=MIXED, **options)
    for row, task in enumerate(MIXED):
        alone = model.generate(ids[row : row + 1], task=task, **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)
    index = torch.tensor([TASKS.index(task) for task in MIXED])
    assert torch.equal(model.generate(ids, task_index=index, **options), together)


def test_a_task_out_of_range_is_named(model):
    model.prepare()
    with torch.no_grad(), pytest.raises(ValueError, match="from -1 .* to 2, got 3"):
        model(**batch(), task_index=torch.tensor([0, 3, 0, 0]))
    with torch.no_grad(), pytest.raises(ValueError, match="for 3 samples, but the batch has 4"):
        model(**batch(), task_index=torch.tensor([0, 1, 0]))


def test_a_model_without_adapters_has_nothing_to_keep():
    model = get_hyperformer_model(tiny_t5(dtype=torch.float32), tiny_config("finetuning")).eval()
    logits(model)
    model.prepare()
    assert prepared_bytes(model) == 0


def test_float16_that_overflowed_is_clamped():
    model = tiny_model(t5=tiny_t5(dtype=torch.float16)).eval()
    model.prepare()
    with torch.no_grad():
        weights = context_of(model, "stsb", None, False).stacks["encoder"]
        x = torch.randn(1, 1, 32).half()
        x[..., 3] = torch.inf
        clamped = x.clamp(max=torch.finfo(torch.float16).max)
        assert torch.equal(weights.adapt(x, 0, None), weights.adapt(clamped, 0, None))


def test_a_precision_that_is_set_by_backend(model):
    """PyTorch has no answer then to what the precision is of all backends, and raises."""
    before = torch.backends.cuda.matmul.fp32_precision
    expected = logits(model)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        close(logits(model), expected)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
