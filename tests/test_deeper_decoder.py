"""A T5 whose decoder has more blocks than its encoder: ``generate`` of transformers makes too small a cache for it."""

from __future__ import annotations

import pytest
import torch
from support.prepared import MIXED
from support.t5s import batch, tiny_model, tiny_t5
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

#: Weights large enough that the prompts differ in their answers.
DEEPER = {"num_layers": 2, "num_decoder_layers": 4, "initializer_factor": 4.0}
LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(scope="module")
def inputs():
    found = batch()
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module", params=["auto", False], ids=["fused", "unfused"])
def model(request):
    return tiny_model(t5=tiny_t5(**DEEPER), fuse=request.param).eval()


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_return_sequences": 2, "num_beams": 2},
    "configuration": {"generation_config": GenerationConfig(**LENGTH)},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generates_what_it_generates_without_a_cache(model, inputs, options):
    expected = model.generate(**inputs, task=MIXED, use_cache=False, **LENGTH, **options)
    assert torch.equal(model.generate(**inputs, task=MIXED, **LENGTH, **options), expected)
    assert len(expected.unique(dim=0)) > 1


def test_takes_the_callers_cache(model, inputs):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    expected = model.generate(**inputs, task="mnli", **LENGTH)
    assert torch.equal(model.generate(**inputs, task="mnli", past_key_values=cache, **LENGTH), expected)
    assert len(cache) == DEEPER["num_decoder_layers"]


def test_trains(model):
    out = model(**batch(), task=MIXED)
    assert out.loss.isfinite()


@pytest.mark.filterwarnings("ignore:.*generation_config")
def test_is_assisted(model, inputs):
    ids = inputs["input_ids"][:1]
    expected = model.generate(ids, task="mnli", max_new_tokens=8)
    assert torch.equal(model.generate(ids, task="mnli", assistant_model=tiny_t5(seed=1), max_new_tokens=8), expected)


@pytest.mark.parametrize("way", ["argument", "config"])
def test_a_cache_that_would_be_too_small_is_refused(model, inputs, way):
    kind = {"cache_implementation": "static"}
    options = {**kind, **LENGTH} if way == "argument" else {"generation_config": GenerationConfig(**kind, **LENGTH)}
    with pytest.raises(ValueError, match="'static' cannot serve this T5: its decoder has 4 blocks and its encoder 2"):
        model.generate(**inputs, task="mnli", **options)


def test_an_assistant_whose_cache_would_be_too_small_is_refused(inputs):
    model, ids = tiny_model(), inputs["input_ids"][:1]
    with pytest.raises(ValueError, match="take another assistant_model"):
        model.generate(ids, task="mnli", assistant_model=tiny_model(t5=tiny_t5(**DEEPER)), **LENGTH)
