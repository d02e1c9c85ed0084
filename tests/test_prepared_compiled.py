"""Weights that are kept between forwards in evaluation, and torch.compile: no graph holds them."""

from __future__ import annotations

import copy

import pytest
import torch
from support.prepared import MIXED, assigned, close, logits, truth, within_data
from support.t5s import batch, tiny_model, tiny_t5
from torch._dynamo.utils import counters


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
