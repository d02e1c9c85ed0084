"""torch.compile: one graph for all tasks, which are chosen outside of it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.t5s import TASKS, batch, tiny_model, tiny_t5
from torch._dynamo.utils import counters
from transformers import T5Config, T5EncoderModel

MIXED = ["cola", "mnli", "mnli", "stsb"]
TWELVE = [f"task {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def encoder(tasks=TWELVE, **config):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 1}
    torch.manual_seed(0)
    return tiny_model(t5=T5EncoderModel(T5Config(**sizes)).eval(), tasks=tasks, **config)


def inputs():
    return {name: tensor for name, tensor in batch().items() if name != "labels"}


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_takes_it_in_one_graph():
    model, inputs = tiny_model(t5=tiny_t5(num_layers=1, num_decoder_layers=1)), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for task in ("mnli", MIXED):
        expected = model(**inputs, task=task)
        out = compiled(**inputs, task=task)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-9, atol=1e-9)
        model.zero_grad()
        expected.loss.backward()
        want = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        out.loss.backward()
        for name, p in model.named_parameters():
            if want[name] is not None:
                torch.testing.assert_close(p.grad, want[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("in_place", [True, False])
def test_twelve_tasks_are_one_graph(in_place):
    plain, model = encoder(), encoder()
    if in_place:
        model.compile(backend="eager", fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    answers = []
    for task in TWELVE:
        answers.append(compiled(**inputs(), task=task).last_hidden_state)
        expected = plain(**inputs(), task=task).last_hidden_state
        torch.testing.assert_close(answers[-1], expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 1
    assert not torch.allclose(answers[0], answers[1]), "the tasks do not differ, so the test shows nothing"


@pytest.mark.parametrize(
    "config", [{"variant": "adapters"}, {"variant": "finetuning"}, {"train_adapters_blocks": False}]
)
def test_other_methods_are_one_graph_too(config):
    model = encoder(TASKS, **config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for task in (*TASKS, MIXED):
        expected = model(**inputs(), task=task).last_hidden_state
        torch.testing.assert_close(compiled(**inputs(), task=task).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 2, "one for a single task, one for several"


def test_mixed_batches_are_one_graph_whatever_is_in_them():
    plain, model = encoder(), encoder()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for chosen in ([3, 1, 1, 11], [0, 1, 2, 3], [5, 4, 5, 4]):
        names = [TWELVE[i] for i in chosen]
        expected = plain(**inputs(), task=names).last_hidden_state
        for task in ({"task": names}, {"task_index": torch.tensor(chosen)}):
            got = compiled(**inputs(), **task).last_hidden_state
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 2, "one for names, one for task_index"


def test_every_embedding_has_a_gradient_from_a_compiled_forward_too():
    model = encoder(TASKS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**inputs(), task="mnli").last_hidden_state.sum().backward()
    gradients = {name: p.grad for name, p in model.task_embeddings.task_to_embeddings.items()}
    assert gradients["mnli"].abs().sum() > 0
    assert torch.equal(gradients["cola"], torch.zeros(6)) and torch.equal(gradients["stsb"], torch.zeros(6))


def test_within_a_module_that_is_compiled_as_a_whole():
    model = encoder(TASKS)

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **kwargs):
            return self.inner(**kwargs).last_hidden_state * 2

    compiled = torch.compile(Around(), backend="eager", fullgraph=True)
    for task in (*TASKS[:2], MIXED):
        expected = 2 * model(**inputs(), task=task).last_hidden_state
        torch.testing.assert_close(compiled(**inputs(), task=task), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_compiled_model_is_its_own():
    model = encoder(TASKS)
    model.compile(backend="eager", fullgraph=True)
    expected = model(**inputs(), task="mnli").last_hidden_state
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.hypernetworks.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(**inputs(), task="mnli").last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_misuse_is_named_under_a_compiler():
    model = encoder(TASKS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="unknown task 'rte'"):
        compiled(**inputs(), task="rte")
    with pytest.raises(Exception, match="for 1 samples, but the batch has 4"):
        compiled(**inputs(), task=["mnli"])


def test_only_the_chosen_tasks_weights_are_generated_in_eager_mode(monkeypatch):
    from hyperformer_fast import ops

    model, sizes, plain = encoder(), [], ops.generate_weights
    monkeypatch.setattr(ops, "generate_weights", lambda E, G, g0: (sizes.append(E.shape[1]), plain(E, G, g0))[1])
    for task in (TWELVE[3], [TWELVE[3]] * 4, [TWELVE[5], TWELVE[1], TWELVE[1], TWELVE[5]]):
        model(**inputs(), task=task)
    assert [size // model.hypernetworks["encoder"].num_sites for size in sizes] == [1, 1, 2]
