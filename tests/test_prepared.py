"""Weights that are kept between forwards in evaluation: they save the generation, and are never stale."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support.t5s import TASKS, VARIANTS, batch, tiny_config, tiny_model, tiny_t5
from torch._dynamo.utils import counters
from torch.func import functional_call

from hyperformer_fast import get_hyperformer_model, prepared
from hyperformer_fast.backends import use_backend
from hyperformer_fast.hypernetwork import AdapterSource, HyperNetwork
from hyperformer_fast.stamp import PROBES, Stamp

MIXED = ["mnli", "cola", "mnli", "stsb"]


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()


@pytest.fixture
def generated(monkeypatch):
    """Counts the stacks whose weights were generated."""
    counted = []

    def count(name):
        real = getattr(HyperNetwork, name)

        def counting(net, embeddings):
            counted.append(name)
            return real(net, embeddings)

        monkeypatch.setattr(HyperNetwork, name, counting)

    for name in ("forward", "forward_each"):
        count(name)
    return counted


@torch.no_grad()
def logits(model, task="stsb", **inputs):
    return model(**(inputs or batch()), task=task).logits


def truth(model, task="stsb"):
    """What the model answers where it keeps nothing."""
    with torch.enable_grad():
        return model(**batch(), task=task).logits.detach()


def prepared_bytes(model):
    return model.memory_footprint().prepared


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


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


def add_one(parameter):
    return parameter.detach() + 1


def step_of(optimizer):
    def step(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer(trained).step()

    return step


def assigned(model):
    parameter = model.hypernetworks["decoder"].generator.weight
    parameter.data = add_one(parameter)


def assigned_twice(model):
    """The allocator may give the third tensor the first one's address."""
    parameter = model.hypernetworks["decoder"].generator.weight
    old = parameter.detach().clone()
    parameter.data = torch.zeros(3)
    parameter.data = old + 1


def within_data(model):
    for parameter in model.hypernetworks.parameters():
        parameter.data.mul_(2)


def through_numpy(model):
    model.hypernetworks["encoder"].generator.weight.detach().numpy()[:] *= 2


def in_place(model):
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["stsb"][3].add_(1)


def replaced_parameter(model):
    generator = model.hypernetworks["encoder"].generator
    generator.weight = torch.nn.Parameter(add_one(generator.weight))


def replaced_module(model):
    net = model.hypernetworks["decoder"]
    net.projector = type(net.projector)(18, 8, 6)


def replaced_net(model):
    torch.manual_seed(5)
    net = model.hypernetworks["encoder"]
    model.hypernetworks["encoder"] = HyperNetwork(net.config, net.layout.d, net.num_layers).eval()
    torch.nn.init.normal_(model.hypernetworks["encoder"].generator.weight)


def loaded(model, **options):
    state = {name: value + 1 if name.startswith("hyper") else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, **options)


def moved_and_back(model):
    model.to(torch.float64)
    in_place(model)
    model.to(torch.float32)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        within_data(model)
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def activation(model):
    model.hyperformer_config.non_linearity = "relu"


def shared_embedding(model):
    config = model.hyperformer_config
    config.task_to_embeddings = {**{task: task for task in TASKS}, "stsb": "mnli"}


def set_storage(model):
    parameter = model.hypernetworks["decoder"].generator.weight
    with torch.no_grad():
        parameter.set_(add_one(parameter))


CHANGES = [
    step_of(lambda ps: torch.optim.SGD(ps, lr=0.5, foreach=False)),
    step_of(lambda ps: torch.optim.AdamW(ps, lr=0.5, foreach=True)),
    step_of(lambda ps: torch.optim.AdamW(ps, lr=0.5, fused=True)),
    assigned,
    assigned_twice,
    within_data,
    through_numpy,
    in_place,
    replaced_parameter,
    replaced_module,
    replaced_net,
    loaded,
    lambda model: loaded(model, assign=True),
    moved_and_back,
    swapped,
    activation,
    shared_embedding,
    set_storage,
]
NAMES = ["SGD", "AdamW foreach", "AdamW fused", *(change.__name__ for change in CHANGES[3:12]), "loaded by assignment"]
NAMES += [change.__name__ for change in CHANGES[13:]]


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_change_is_noticed(model, change):
    before = logits(model)
    assert prepared_bytes(model) > 0
    change(model)
    after = logits(model)
    assert not torch.allclose(after, before)
    close(after, truth(model))
    assert torch.equal(logits(model), after)


def test_another_order_of_the_tasks_is_noticed(model):
    before = logits(model, "mnli")
    model.prepare()
    model.hyperformer_config.tasks[:] = ["stsb", "mnli", "cola"]
    with torch.no_grad():
        close(model(**batch(), task_index=torch.tensor([1] * 4)).logits, before)
    close(logits(model, "mnli"), before)


def test_a_new_task_is_noticed(model):
    logits(model, MIXED)
    model.add_task("new", init_from="mnli")
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["new"].add_(1)
    for task in ("new", ["new", *MIXED[1:]]):
        close(logits(model, task), truth(model, task))


def test_a_change_within_inference_mode_is_noticed(model):
    before = logits(model)
    with torch.inference_mode():
        for parameter in model.hypernetworks.parameters():
            parameter.add_(1)
        after = model(**batch(), task="stsb").logits
    assert not torch.allclose(after, before)
    close(after.clone(), truth(model))


def test_parameters_made_in_inference_mode_are_not_relied_on(generated):
    with torch.inference_mode():
        model = tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()
        model(**batch(), task="stsb")
        generated.clear()
        model(**batch(), task="stsb")
        assert len(generated) == 2 and prepared_bytes(model) == 0
        with pytest.raises(RuntimeError, match="made in inference mode"):
            model.prepare()


def test_parameters_that_a_call_brings_along(model):
    inputs = {**batch(), "task": "stsb"}
    before = logits(model)
    others = {name: p + 1 for name, p in model.named_parameters() if name.startswith("hypernetworks")}
    with torch.no_grad():
        with_others = functional_call(model, others, (), inputs).logits
    assert not torch.allclose(with_others, before)
    assert torch.equal(logits(model), before)


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


@pytest.mark.parametrize("interferes", ["hook", "pre-hook", "forward", "class", "parametrisation"])
def test_somebody_elses_code_in_a_hypernetwork_runs_every_time(model, generated, interferes):
    net = model.hypernetworks["decoder"]
    logits(model)
    if interferes == "hook":
        net.projector.register_forward_hook(lambda module, args, out: out + 1)
    elif interferes == "pre-hook":
        net.register_forward_pre_hook(lambda module, args: None)
    elif interferes == "forward":
        net.projector.forward = lambda x: type(net.projector).forward(net.projector, x) + 1
    elif interferes == "class":
        net.generator.__class__ = type("Other", (type(net.generator),), {})
    else:
        torch.nn.utils.parametrizations.weight_norm(net.projector[0])
    generated.clear()
    for _ in range(2):
        close(logits(model), truth(model))
    assert len(generated) == 8
    with pytest.raises(RuntimeError, match=r"cannot keep .* up to date: (somebody's hook|\w+ is not a class)"):
        model.prepare()


def test_transforms_and_modes_generate_anew(model, generated):
    logits(model)
    generated.clear()
    inputs = {**batch(), "task": "stsb"}
    trained = dict(model.hypernetworks.named_parameters())

    def loss(parameters):
        named = {f"hypernetworks.{name}": p for name, p in parameters.items()}
        return functional_call(model, named, (), inputs).loss

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    assert len(generated) == 2 and all(g.abs().sum() > 0 for g in gradients.values())


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


def test_every_parameter_of_every_variant_is_watched():
    for variant in VARIANTS:
        model = tiny_model(variant).eval()
        parts = (model.task_embeddings, model.hypernetworks)
        for part in parts:
            for parameter in part.parameters():
                stamp = Stamp(parts)
                assert stamp.holds()
                parameter.data.view(-1)[0] += 1
                assert not stamp.holds()


def test_a_single_number_of_a_large_parameter_is_noticed(model):
    weight = model.hypernetworks["encoder"].generator.weight
    assert weight.numel() // PROBES > 1  # or the number below would be among those that are compared
    stamp = Stamp([model.hypernetworks])
    with torch.no_grad():
        weight.view(-1)[1] += 1
    assert not stamp.holds()


def test_all_numbers_of_a_small_parameter_are_compared(model):
    embedding = model.task_embeddings.task_to_embeddings["mnli"]
    assert embedding.numel() <= PROBES
    for place in range(embedding.numel()):
        stamp = Stamp([model.task_embeddings])
        embedding.data[place] += 1
        assert not stamp.holds()


def test_the_classes_of_all_parts_are_known():
    for variant in VARIANTS:
        model = tiny_model(variant, train_task_embeddings=variant != "adapters")
        assert all(isinstance(net, AdapterSource) for net in model.hypernetworks.values())
        Stamp([model.task_embeddings, model.hypernetworks])


def test_a_model_without_adapters_has_nothing_to_keep():
    model = get_hyperformer_model(tiny_t5(dtype=torch.float32), tiny_config("finetuning")).eval()
    logits(model)
    model.prepare()
    assert prepared_bytes(model) == 0


def one_block():
    return tiny_model(t5=tiny_t5(dtype=torch.float32, num_layers=1, num_decoder_layers=1)).eval()


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_forward_holds_no_weights(in_place):
    model = one_block()
    plain = copy.deepcopy(model)
    logits(model)  # weights are kept before the graph is made
    compiled = model
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change in (lambda model: None, within_data, assigned):
        change(model), change(plain)
        for task in ("stsb", "cola"):
            close(logits(compiled, task), truth(plain, task))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_t5_reads_what_is_kept_now():
    """As transformers compiles a T5 that generates with a static cache."""
    model = one_block()
    plain = copy.deepcopy(model)
    ids, options = batch()["input_ids"], {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    encoder = model.t5.encoder
    encoder.forward = torch.compile(encoder.forward, backend="eager", fullgraph=True)
    for change in (lambda model: None, within_data):
        change(model), change(plain)
        for task in ("stsb", "cola", MIXED, "stsb"):
            assert torch.equal(model.generate(ids, task=task, **options), plain.generate(ids, task=task, **options))


def test_float16_that_overflowed_is_clamped():
    model = tiny_model(t5=tiny_t5(dtype=torch.float16)).eval()
    model.prepare()
    with torch.no_grad():
        weights = model._context("stsb", None, False).stacks["encoder"]
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
