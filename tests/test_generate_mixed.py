"""``generate`` on a batch of mixed tasks gives, row by row, the tokens of a call for this row's task alone."""

from __future__ import annotations

import pytest
import torch
from support.prepared import MIXED
from support.t5s import TASKS, batch, tiny_model, tiny_t5
from transformers.modeling_outputs import BaseModelOutput

ROWS, EOS = 6, 1
NAMES = (MIXED * 2)[:ROWS]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "beams with a static cache": {"num_beams": 2, "cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32, initializer_factor=4.0)).eval()


@pytest.fixture
def inputs():
    """Rows of several lengths, padded."""
    found = batch(B=ROWS)
    for row in range(ROWS):
        found["attention_mask"][row, 7 - row % 4 :] = 0
        found["input_ids"][row, 7 - row % 4 :] = 0
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def same(row: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether two rows have the same tokens up to the end of the text. What fills a row up depends on the others."""
    one, other = (each.tolist()[1:] for each in (row, alone))
    one, other = (each[: each.index(EOS) + 1] if EOS in each else each for each in (one, other))
    return one == other


@pytest.mark.parametrize("encoded", [False, True], ids=["ids", "encoder_outputs"])
@pytest.mark.parametrize("way", WAYS)
def test_each_row_is_that_of_a_call_by_itself(model, inputs, way, encoded):
    options = {"max_new_tokens": 6, **WAYS[way]}
    mask, given = inputs["attention_mask"], inputs
    if encoded:
        given = {"attention_mask": mask}
        with torch.no_grad():
            states = model(**inputs, decoder_input_ids=mask[:, :1] * 0, task=NAMES).encoder_last_hidden_state
    several = options.get("num_return_sequences", 1)

    def generated(rows: slice, tasks: list[str]) -> list[torch.Tensor]:
        part = {name: value[rows] for name, value in given.items()}
        if encoded:
            part["encoder_outputs"] = BaseModelOutput(states[rows])
        named = tasks if len(tasks) > 1 else tasks[0]
        return list(model.generate(**part, task=named, **options).unflatten(0, (-1, several)))

    together = generated(slice(None), NAMES)
    for row, task in enumerate(NAMES):
        (alone,) = generated(slice(row, row + 1), [task])
        assert all(same(one, other) for one, other in zip(together[row], alone, strict=True)), (row, task)
    assert len({tuple(each[0].tolist()) for each in together}) > 2


def test_sampling_with_a_seed(model, inputs):
    """torch draws numbers for the batch as a whole, so that a row's depend on its place and on the number of rows, but
    not on the tasks: the mixed call gives what calls of the same rows for each task alone give with the same seed."""
    options = {"max_new_tokens": 6, "do_sample": True}

    def sampled(tasks):
        torch.manual_seed(7)
        return model.generate(**inputs, task=tasks, **options)

    together, alone = sampled(NAMES), {task: sampled(task) for task in TASKS}
    for row, task in enumerate(NAMES):
        assert same(together[row], alone[task][row]), (row, task)
    assert len({tuple(row.tolist()) for row in together}) > 2


def test_a_static_cache_serves_again_beside_a_deeper_encoder(model, inputs):
    """transformers 4.57 keeps the cache, with as many layers as the encoder has, and failed at the next generation."""
    assert model.config.num_layers != model.config.num_decoder_layers
    options = {"max_new_tokens": 4, "cache_implementation": "static"}
    first, again = (model.generate(**inputs, task=NAMES, **options) for _ in range(2))
    assert torch.equal(first, again)
