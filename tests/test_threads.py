"""One model in several threads at once: every answer is that of a call by itself, and what would make it wrong is
refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.prepared import MIXED, close, logits
from support.t5s import TASKS, batch, tiny_model, tiny_t5
from transformers import ByT5Tokenizer

from hyperformer_fast import HyperFormerModel, fit_task, nearest_task
from hyperformer_fast.export import weights
from hyperformer_fast.training.generation import generate_mixed

ROUNDS = 4


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32, dropout=0.1, initializer_factor=4.0)).eval()


@pytest.fixture(autouse=True)
def switch_often():
    """Threads change places after every few instructions of Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """What each of ``acts`` returns, each in a thread of its own, which all begin together."""
    results: list[Any] = [None] * len(acts)
    barrier = threading.Barrier(len(acts))

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = acts[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


INPUTS = batch()
IDS, MASK = INPUTS["input_ids"], INPUTS["attention_mask"]
#: Calls of every kind, each of other tasks than its neighbours.
CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "forward of one task": lambda m: logits(m, "stsb", **INPUTS),
    "forward of many": lambda m: logits(m, MIXED, **INPUTS),
    "forward of indices": lambda m: m(**INPUTS, task_index=torch.tensor([2, -1, 0, 1])).logits.detach(),
    "greedy": lambda m: m.generate(IDS, attention_mask=MASK, task="cola", max_new_tokens=4),
    "greedy of many": lambda m: m.generate(IDS, attention_mask=MASK, task=MIXED, max_new_tokens=5),
    "beams": lambda m: m.generate(IDS, attention_mask=MASK, task=MIXED[::-1], max_new_tokens=3, num_beams=3),
    "static cache": lambda m: m.generate(
        IDS, attention_mask=MASK, task=MIXED, max_new_tokens=4, cache_implementation="static"
    ),
    "another static cache": lambda m: m.generate(
        IDS.flip(1), attention_mask=MASK.flip(1), task=MIXED[::-1], max_new_tokens=4, cache_implementation="static"
    ),
    "footprint": lambda m: torch.tensor(m.memory_footprint().t5),
}


def repeated(act: Callable[[Any], torch.Tensor], model: Any) -> Callable[[], list[torch.Tensor]]:
    return lambda: [act(model) for _ in range(ROUNDS)]


def test_calls_of_every_kind_at_once(model):
    expected = [act(copy.deepcopy(model)) for act in CALLS.values()]
    found = at_once(*(repeated(act, model) for act in CALLS.values()))
    for name, alone, together in zip(CALLS, expected, found, strict=True):
        assert all(torch.equal(each, alone) for each in together), name


@pytest.mark.parametrize("variant", ["hyperformer", "adapters"])
def test_first_use_and_prepare_race(variant):
    """Weights are generated, folded and kept by whoever comes first."""
    for prepares in (False, True):
        model = tiny_model(variant, tiny_t5(dtype=torch.float32)).eval()
        expected = {task: logits(copy.deepcopy(model), task, **INPUTS) for task in TASKS}
        acts = [lambda task=task: logits(model, task, **INPUTS) for task in TASKS * 2]
        more = [lambda: model.prepare(), lambda: model.prepare("cola")] if prepares else []
        found = at_once(*acts, *more)
        for task, each in zip(TASKS * 2, found):
            assert torch.equal(each, expected[task])


_FIRST_USE = """
import sys, threading, torch
sys.path.insert(0, {tests!r})
from support.t5s import TASKS, batch, tiny_model, tiny_t5
model, inputs = tiny_model(t5=tiny_t5(dtype=torch.float32)).eval(), batch()
barrier, found = threading.Barrier(6), {{}}
def serve(i):
    barrier.wait()
    with torch.no_grad():
        found[i] = model(**inputs, task=TASKS[i % 3]).logits
threads = [threading.Thread(target=serve, args=(i,)) for i in range(6)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
with torch.no_grad():
    assert all(torch.equal(found[i], model(**inputs, task=TASKS[i % 3]).logits) for i in range(6))
print("right")
"""


def test_the_first_use_in_a_process_races():
    """Libraries are loaded, tested and chosen by several threads at once."""
    code = _FIRST_USE.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-W", "error:hyperformer_fast:RuntimeWarning", "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def test_one_thread_asks_for_gradients_and_another_is_in_inference_mode(model):
    def gradient() -> list[torch.Tensor]:
        names, parameters = zip(*model.hypernetworks.named_parameters())
        return list(torch.autograd.grad(model(**INPUTS, task=MIXED).loss, parameters))

    def infer() -> torch.Tensor:
        with torch.inference_mode():
            return model(**INPUTS, task=MIXED).logits

    gradients, answer = gradient(), infer().clone()
    for _ in range(ROUNDS):
        one, other, third = at_once(gradient, infer, infer)
        assert all(torch.equal(a, b) for a, b in zip(one, gradients, strict=True))
        assert torch.equal(other, answer) and torch.equal(third, answer)


def test_tasks_come_and_go_meanwhile(model):
    expected = {task: logits(model, task, **INPUTS) for task in TASKS}

    def change() -> list[torch.Tensor]:
        answers = []
        for i in range(6):
            model.add_task(f"new {i}", init_from="cola")
            answers.append(logits(model, f"new {i}", **INPUTS))
            model.remove_task(f"new {i}")
        return answers

    added, *found = at_once(
        change, *(lambda task=task: [logits(model, task, **INPUTS) for _ in range(12)] for task in TASKS)
    )
    for task, answers in (("cola", added), *zip(TASKS, found, strict=True)):
        assert all(torch.equal(each, expected[task]) for each in answers), task
    assert model.hyperformer_config.tasks == TASKS


class Held:
    """What another thread does until it calls the function ``stop`` that it is given, where it waits until the ``with``
    block is left."""

    def __init__(self, act: Callable[[Callable[[], None]], Any], name: str = "the other thread"):
        self._act, self._stopped, self._go_on = act, threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, name=name)

    def _stop(self) -> None:
        if threading.current_thread() is self._thread:
            self._stopped.set()
            self._go_on.wait()

    def _run(self) -> None:
        try:
            self.result = self._act(self._stop)
        except Exception as error:
            self.error = error
            self._stopped.set()

    def __enter__(self) -> Held:
        self._thread.start()
        self._stopped.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._go_on.set()
        self._thread.join()


def forward_held(model: Any, run: Callable[[], Any]) -> Held:
    """A forward that stops in its first block."""

    def act(stop: Callable[[], None]) -> Any:
        handle = model.t5.encoder.block[0].register_forward_pre_hook(lambda *_: stop())
        try:
            return run()
        finally:
            handle.remove()

    return Held(act)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set this model to training": lambda m: m.train(),
    "move or cast this model": lambda m: m.to(torch.float64),
    "load weights into this model": lambda m: m.load_state_dict(m.state_dict()),
    "unload this model": lambda m: m.unload(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_would_change_an_answer_on_its_way_is_refused(model, what):
    expected = logits(model, "cola", **INPUTS)
    with forward_held(model, lambda: logits(model, "cola", **INPUTS)) as held:
        with pytest.raises(RuntimeError, match=rf"cannot {what} while another thread \(the other thread\)"):
            CHANGES[what](model)
        model.eval()  # no change
        assert torch.equal(logits(model, "stsb", **INPUTS), logits(copy.deepcopy(model), "stsb", **INPUTS))
    assert held.error is None and torch.equal(held.result, expected)
    CHANGES[what](model)


def test_a_training_forward_keeps_its_mode(model):
    model.train()
    with forward_held(model, lambda: model(**INPUTS, task="cola").loss) as held:
        with pytest.raises(RuntimeError, match="cannot set this model to evaluation while another thread"):
            model.eval()
    assert held.error is None


def trained_elsewhere(model: Any) -> Held:
    """Another thread that has made a step with the model, and is still there."""

    def act(stop: Callable[[], None]) -> None:
        model.train()
        model(**INPUTS, task="cola").loss.backward()
        stop()

    return Held(act, "trainer")


@pytest.mark.parametrize("ask", [CALLS["forward of one task"], CALLS["greedy"]], ids=["forward", "generate"])
def test_no_answer_from_a_model_that_another_thread_trains(model, ask):
    expected = ask(model)
    with trained_elsewhere(model):
        with pytest.raises(RuntimeError, match=r"the thread trainer trains this model.* answer from a copy"):
            ask(model)
        assert torch.equal(ask(copy.deepcopy(model).eval()), expected)
        model(**INPUTS, task="cola").loss.backward()  # as in Hogwild
    ask(model)  # in training mode, as its one user wants it
    assert torch.equal(ask(model.eval()), expected)


ROWS = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in zip(IDS, INPUTS["labels"])]
#: What is in evaluation mode meanwhile.
IN_EVALUATION: dict[str, Callable[[Any], Any]] = {
    "nearest_task": lambda m: nearest_task(m, ROWS),
    "fit_task": lambda m: fit_task(m, "new", ROWS, steps=1, init_from="cola"),
    "generate_mixed": lambda m: generate_mixed(
        m, ByT5Tokenizer(), ["cola"], ["!"], {"cola": {"max_new_tokens": 2}}, 1, 8
    ),
}


@pytest.mark.parametrize("ask", IN_EVALUATION)
def test_dropout_of_another_threads_training_stays_on(model, ask):
    with trained_elsewhere(model):
        with pytest.raises(RuntimeError, match="the thread trainer trains this model"):
            IN_EVALUATION[ask](model)
        assert all(part.training for part in model.modules())
    IN_EVALUATION[ask](model)
    assert all(part.training for part in model.modules())


def test_dropout_comes_on_again_in_no_other_threads_answer(model):
    model.train()
    block, held = model.t5.decoder.block[0], []

    def begin(*_: Any) -> None:
        handle.remove()
        held.append(forward_held(model, lambda: logits(model, "cola", **INPUTS)))
        held[0].__enter__()

    handle = block.register_forward_pre_hook(begin)
    with pytest.raises(RuntimeError, match=r"cannot set this model to training while another thread \(the other"):
        nearest_task(model, ROWS)
    assert not any(part.training for part in model.modules())
    held[0].__exit__()
    assert held[0].error is None and torch.equal(held[0].result, logits(model, "cola", **INPUTS))


def test_models_are_saved_moved_and_measured_while_tasks_come_and_go(model, tmp_path):
    def change() -> None:
        for i in range(100):
            model.add_task(f"new {i}", init_from="cola")
            model.rename_task(f"new {i}", "renamed")
            model.remove_task("renamed")

    def save() -> None:
        for _ in range(4):
            model.save_pretrained(tmp_path)
            assert HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5(dtype=torch.float32, initializer_factor=4.0))

    def use() -> None:
        for _ in range(30):
            model.memory_footprint()
            model.float()

    at_once(change, use, save)


def test_what_is_materialised_is_of_the_task_that_was_asked_for(model, monkeypatch):
    """Another thread removes the first task when the name was looked up, and the weights were not yet generated."""
    expected = model.materialize("stsb").adapters
    expect_whole = weights.expect_whole

    def removed(module: Any) -> None:
        monkeypatch.undo()
        at_once(lambda: model.remove_task(TASKS[0]))
        expect_whole(module)

    monkeypatch.setattr(weights, "expect_whole", removed)
    for name, adapter in model.materialize("stsb").adapters.items():
        assert torch.equal(adapter.down.weight, expected[name].down.weight)


def test_an_error_in_a_forward_is_no_forward_that_runs(model):
    with pytest.raises(ValueError, match="unknown task"):
        logits(model, "nothing", **INPUTS)
    at_once(lambda: model.train(), lambda: None)
    close(logits(model.eval(), "cola", **INPUTS), logits(copy.deepcopy(model), "cola", **INPUTS))
