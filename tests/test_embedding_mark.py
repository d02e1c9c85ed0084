"""A plain state dict is not loaded into a model that reads its embeddings in another way."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from support.t5s import TASKS, batch, tiny_model

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.checkpoint import CheckpointError

GENERATED = ("hyperformer++", "hyperformer-shared", "hyperformer")
RECIPES = ("authors", "default")
PARTS = ("task_embeddings", "hypernetworks.encoder", "hypernetworks.decoder")
ENTRIES = [f"{part}.normalized._extra_state" for part in PARTS]
SAYS = {
    "default": 'reads its embeddings as they are .recipe "authors".*whose configuration has recipe "authors"',
    "authors": 'normalises its embeddings .recipe "default".*whose configuration has recipe "default"',
}  # of the model that loads


def other_than(recipe):
    return RECIPES[1 - RECIPES.index(recipe)]


def through_pickle(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state, folder):
    tensors = {name: value.clone() for name, value in state.items()}  # tied ones share memory
    safetensors.torch.save_file(tensors, folder / "state.safetensors")
    return safetensors.torch.load_file(folder / "state.safetensors")


THROUGH = pytest.mark.parametrize("through", [through_pickle, through_safetensors])


def changed(state, by=0.125):
    return {name: value + by if value.is_floating_point() else value for name, value in state.items()}


def values(model):
    return {name: value.clone() for name, value in model.named_parameters()}


@THROUGH
@pytest.mark.parametrize("variant", GENERATED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_the_other_recipe_are_refused_and_nothing_changes(recipe, variant, through, tmp_path):
    model = tiny_model(variant, recipe=recipe)
    state = through(changed(tiny_model(variant, recipe=other_than(recipe)).state_dict()), tmp_path)
    before = values(model)
    with pytest.raises(CheckpointError, match=f"{SAYS[recipe]}.*Nothing was loaded"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@THROUGH
@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_the_same_recipe_load_strictly(recipe, through, tmp_path):
    model, other = tiny_model(recipe=recipe).eval(), tiny_model(recipe=recipe).eval()
    state = through(changed(other.state_dict()), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(model.load_state_dict(state)) and not any(other.load_state_dict(state))
    assert torch.equal(model(**batch(), task="cola").logits, other(**batch(), task="cola").logits)


def test_a_state_dict_from_before_there_were_recipes_is_one_of_recipe_authors():
    for variant in GENERATED:
        model = tiny_model(variant, recipe="authors")
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters(remove_duplicate=False)]


def test_what_is_said_can_be_done():
    """By somebody who knows that only the mark was left out."""
    model = tiny_model(recipe="default")
    state = {name: value for name, value in model.state_dict().items() if name not in ENTRIES}
    with pytest.raises(
        CheckpointError, match=r"add to the state dict what model\.state_dict\(\) has under names that end"
    ):
        model.load_state_dict(state)
    state |= {name: value for name, value in model.state_dict().items() if name.endswith("normalized._extra_state")}
    assert not any(model.load_state_dict(state))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_load_that_is_not_strict_warns(recipe):
    model, other = tiny_model(recipe=recipe), tiny_model(recipe=other_than(recipe))
    with pytest.warns(UserWarning, match=SAYS[recipe]):
        missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert (missing, unexpected) == ((ENTRIES, []) if recipe == "default" else ([], ENTRIES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_modules_around_a_model_and_parts_of_it_refuse_too(recipe, tmp_path):
    model, other = tiny_model(recipe=recipe), tiny_model(recipe=other_than(recipe))
    pairs = [(torch.nn.ModuleDict({"a": model}), torch.nn.ModuleDict({"a": other}))]
    pairs += [(torch.compile(model), torch.compile(other)), (model.hypernetworks, other.hypernetworks)]
    pairs += [(model.task_embeddings, other.task_embeddings)]
    for ours, theirs in pairs:
        with pytest.warns(UserWarning, match=SAYS[recipe]):
            with pytest.raises(RuntimeError, match=r"key.s. in state_dict: .*normalized\._extra_state"):
                ours.load_state_dict(theirs.state_dict())
        ours.load_state_dict(ours.state_dict())
    safetensors.torch.save_model(other, tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match=SAYS[recipe]), pytest.raises(RuntimeError, match=r"normalized\._extra_state"):
        safetensors.torch.load_model(model, tmp_path / "other.safetensors")
    safetensors.torch.load_model(other, tmp_path / "other.safetensors")


def test_a_checkpoint_has_no_mark_and_needs_none(tmp_path):
    model = tiny_model(recipe="default")
    model.save_pretrained(tmp_path)
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not any("normalized" in name for name in held)
    again = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_model(recipe="default").unload())
    assert not any(again.load_state_dict(held)) and again.hyperformer_config.normalize_embeddings
    with pytest.raises(CheckpointError, match="recipe is 'default' in the checkpoint, 'authors' in this model"):
        tiny_model(recipe="authors").load_state_dict(held)


def test_the_mark_is_no_parameter_and_no_buffer():
    model, plain = tiny_model(recipe="default"), tiny_model(recipe="authors")
    assert list(values(model)) == list(values(plain)) and model.parameter_count() == plain.parameter_count()
    assert not list(model.hypernetworks.buffers()) and not list(model.task_embeddings.buffers())
    assert model.memory_footprint() == plain.memory_footprint()
    for variant in ("adapters", "finetuning"):
        assert not any("_extra_state" in name for name in tiny_model(variant, recipe="default").state_dict())


def test_it_goes_where_the_model_goes():
    model = tiny_model(recipe="default")
    model.add_task("new", init_from="cola")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.bfloat16)):
        state = again.state_dict()
        assert [name for name in state if name in ENTRIES] == ENTRIES
        assert {state[name].dtype for name in ENTRIES} == {torch.uint8}
        assert not any(again.load_state_dict(state, assign=True))
    assert model.eval()(**batch(), task="new").logits.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dicts_of_distributed_checkpoints(recipe):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model, other = tiny_model(recipe=recipe), tiny_model(recipe=other_than(recipe))
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        state = get_model_state_dict(model, options=options)
        assert not any(set_model_state_dict(model, dict(state), options=options))
        with pytest.raises(CheckpointError, match=SAYS[other_than(recipe)]):
            set_model_state_dict(other, dict(state), options=options)


def test_marked_hypernetworks_keep_their_weights_between_forwards():
    model = tiny_model(recipe="default").eval()
    model.prepare()
    assert model.memory_footprint().prepared_tasks == len(TASKS)
