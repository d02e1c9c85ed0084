"""What benchmarks/step.py measures: its rows are right, and its time and memory are counted where they belong."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch
from test_benchmarks import BENCHMARKS, STEP

from hyperformer_fast import official


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def tiny_case(benchmark_module):
    """The tiny form of a group of step.py, by its name."""
    return lambda name: benchmark_module("step_cases").CASES[name].tiny()


TRAINING = "T5-small fp32 training dropout={} hyperformer++"


def test_the_authors_calls_in_a_t5_compute_what_ours_do(benchmark_module, tiny_case):
    measure = benchmark_module("step_measure")
    case = tiny_case(TRAINING.format(0))
    original, ours = (measure.build(case, row) for row in ("original", "reference"))
    # an adapter's norms start as zeros and ones, so that only other weights tell one form from another
    with torch.no_grad():
        for parameter in ours.model.hypernetworks.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    original.model.load_official(official.export(ours.model))
    bare = measure.probe(measure.build(case, "bare"), case)
    truth = measure.probe(ours, case)
    for mine, theirs, without in zip(measure.probe(original, case), truth, bare):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(theirs, without, rtol=1e-2, atol=0), "the adapters do nothing"


def test_a_row_that_computes_something_else_is_named_and_not_timed(benchmark_module, monkeypatch, tiny_case):
    measure, original = benchmark_module("step_measure"), benchmark_module("original_t5")
    right = original.apply_adapter
    monkeypatch.setattr(original, "apply_adapter", lambda x, parts: right(x, parts) * 1.01)
    case = dataclasses.replace(tiny_case(TRAINING.format(0.1)), rows=("original", "unfused"))
    found = measure.measure(case, None, 1)
    assert set(found["rows"]) == set(found["memory"]) == {"bare", "unfused"}
    assert set(found["wrong"]) == {"original"} and "is off by" in found["wrong"]["original"]


def test_rows_share_the_frozen_parameters_and_nothing_else(benchmark_module, tiny_case):
    measure, case = benchmark_module("step_measure"), tiny_case(TRAINING.format(0))
    one, other = (dict(measure.build(case, row).model.named_parameters()) for row in ("bare", "bare"))
    assert {name for name in one if one[name] is other[name]} == {name for name in one if not one[name].requires_grad}
    assert any(p.requires_grad for p in one.values()) and not all(p.requires_grad for p in one.values())


def found_in(events):
    """The components of every operator, by its name."""
    found = {}
    for name, event in events:
        found.setdefault(event.name, set()).add(name)
    return found


def test_the_components_of_a_step(benchmark_module, tiny_case):
    measure, components = benchmark_module("step_measure"), benchmark_module("components")
    expected = {
        "aten::bernoulli_": {"dropout"}, "aten::_softmax": {"attention"}, "aten::pow": {"norms"},
        "aten::cat": {"cache"}, "aten::_log_softmax": {"loss"}, "aten::threshold_backward": {"activations"},
        "aten::_fused_adamw_": {"optimizer"}, "aten::mm": {"products"},
    }  # fmt: skip
    ours = {"adapters", "generation"}
    for row in ("bare", "unfused"):
        events = components.by_component(measure.build(tiny_case(TRAINING.format(0.1)), row))
        found = found_in(events)
        assert {name: found[name] - ours for name in expected} == expected
        assert "residuals" in {name for name, _ in events}
        assert {name for name, _ in events} & ours == (ours if row == "unfused" else set())
    assert sum(components.shares(lambda: torch.ones(9).sin()).values()) == pytest.approx(1)


def test_the_backward_of_an_operator_goes_where_the_operator_went(benchmark_module):
    x, layer = torch.randn(8, 8, requires_grad=True), torch.nn.Dropout(0.5)
    events = benchmark_module("components").by_component(lambda: (layer(x) + layer(x)).backward(x))
    of_products = {place for place, event in events if event.name == "aten::mul"}
    assert of_products == {"dropout"}, "dropout's backward is a product without a name of its own"


def test_what_is_kept_counts_each_storage_once_and_no_parameter(benchmark_module):
    memory = benchmark_module("memory")
    w, x = torch.randn(64, 64, requires_grad=True), torch.randn(256, 64, requires_grad=True)
    # x @ w keeps x and w, the sine keeps the product, and the view of it no storage of its own
    kept = memory.saved_bytes(lambda: (x @ w).sin().view(-1).cos(), [w])
    assert kept == 3 * x.nbytes
    peak = benchmark_module("components").peak_bytes(lambda: [torch.ones(1 << 18).sum() for _ in range(3)])
    assert 1 << 20 <= peak < 1.5 * (1 << 20)


def test_a_step_run_goes_on_where_it_ended(benchmark_module, monkeypatch, tmp_path):
    step = benchmark_module("step")
    asked = []

    def measure(case, seconds, rounds):
        asked.append(case.name)
        return STEP["results"][TRAINING.format(0.1)]

    def run(*options):
        asked.clear()
        monkeypatch.setattr("sys.argv", ["step.py", "--quick", "--output", str(tmp_path), *options])
        step.main()
        return set(asked), set(json.loads(next(tmp_path.glob("step-*.json")).read_text())["results"])

    monkeypatch.setattr(step, "measure", measure)
    one, other = TRAINING.format(0), TRAINING.format(0.1)
    assert run("--only", one) == ({one}, {one})
    assert run("--resume", "--only", one, other) == ({other}, {one, other})
    assert run("--only", one) == ({one}, {one, other})
    with pytest.raises(SystemExit, match="no group fits T5-large"):
        run("--only", "T5-large *")
