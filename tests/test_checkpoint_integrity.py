"""A checkpoint is checked whole before it counts: flipped bits, odd descriptions and odd numbers are named."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.t5s import batch, bits, tiny_model, tiny_t5

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.checkpoint import (
    DESCRIPTION,
    DIGEST,
    WEIGHTS_NAME,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is absent or differs")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_model(t5=tiny_t5(dtype=torch.float32)).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "run"))


@pytest.fixture(scope="module")
def t5():
    return tiny_t5(dtype=torch.float32)


def load(t5, folder):
    model = HyperFormerModel.from_pretrained(folder, t5=t5)
    values = bits(model)
    model.unload()
    return values


def described(folder) -> dict:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return json.loads(file.metadata()["hyperformer"])


def rewrite(folder, description=None, tensors=None) -> None:
    """The file with another description or other tensors, and no digest, as files of an earlier version are."""
    description = described(folder) if description is None else description
    if isinstance(description, dict):
        description = {field: value for field, value in description.items() if field != DIGEST}
    held = load_file(folder / WEIGHTS_NAME)
    held.pop(DESCRIPTION, None)
    text = description if isinstance(description, str) else json.dumps(description)
    save_file({**held, **(tensors or {})}, folder / WEIGHTS_NAME, {"hyperformer": text})


def data_start(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def flipped(raw: bytes, bit: int) -> bytes:
    out = bytearray(raw)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_a_flipped_bit_of_any_tensor_is_refused(saved, t5):
    raw = (saved / WEIGHTS_NAME).read_bytes()
    bits_of_tensors, digests = range(8 * data_start(raw), 8 * len(raw)), set()
    for bit in random.Random(0).sample(bits_of_tensors, 60):
        (saved / WEIGHTS_NAME).write_bytes(flipped(raw, bit))
        with pytest.raises(CheckpointError, match="bit rot, or edited.*SHA-256") as caught:
            load(t5, saved)
        assert described(saved)[DIGEST] in str(caught.value)
        digests.add(str(caught.value))
    assert len(digests) == 60, "each message has the digest that was found"
    (saved / WEIGHTS_NAME).write_bytes(raw)
    load(t5, saved)


def test_a_flipped_bit_of_the_header_changes_no_weight(saved, t5):
    """safetensors and the comparison with the model find most; the digest the rest."""
    raw, whole = (saved / WEIGHTS_NAME).read_bytes(), load(t5, saved)
    for bit in random.Random(1).sample(range(8 * data_start(raw)), 60):
        (saved / WEIGHTS_NAME).write_bytes(flipped(raw, bit))
        try:
            found = load(t5, saved)
        except CheckpointError:
            continue
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_load_weights_refuses_it_too_and_keeps_the_model(saved):
    raw = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(flipped(raw, 8 * len(raw) - 3))
    model = tiny_model(t5=tiny_t5(dtype=torch.float32))
    before = bits(model)
    with pytest.raises(CheckpointError, match="bit rot"):
        model.load_weights(saved)
    with pytest.raises(CheckpointError, match="bit rot"):
        load_checkpoint(saved)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_digest_covers_the_description(saved, t5):
    other = described(saved)
    other["config"]["non_linearity"] = "relu"
    held = load_file(saved / WEIGHTS_NAME)
    save_file(held, saved / WEIGHTS_NAME, {"hyperformer": json.dumps(other)})
    with pytest.raises(CheckpointError, match="bit rot, or edited"):
        load(t5, saved)


def test_a_file_without_a_digest_still_loads(saved, t5):
    """As version 0.1.0 wrote it: neither digest of the file nor of the T5."""
    whole, old = load(t5, saved), described(saved)
    del old["base_model"]["frozen"]
    rewrite(saved, old)
    found = load(t5, saved)
    assert DIGEST not in described(saved) and all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_is_in_a_checkpoint_may_have_any_shape_and_float_dtype(tmp_path):
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "turned": torch.randn(3, 4, dtype=torch.float64).T,
        "ü": torch.ones(1, dtype=torch.float16),
    }
    save_checkpoint(tmp_path, tensors, {"a": (1, 2), "b": {"z": None, "y": 1.5}})
    found, description = load_checkpoint(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert description["a"] == [1, 2] and len(description[DIGEST]) == 64


NAME = "task_embeddings.task_to_embeddings.mnli"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(6, dtype=torch.int32), "has dtype I32; allowed are F64, F32, BF16, F16"),
        (torch.ones(6, dtype=torch.bool), "has dtype BOOL; allowed"),
        (torch.ones(6, dtype=torch.complex64), "has dtype C64; allowed"),
        (torch.ones(6, dtype=torch.float8_e4m3fn), "has dtype F8_E4M3; allowed"),
        (
            torch.tensor([1, 2, torch.nan, 4, 5, 6]),
            "has the value nan, which is not finite in this model's",
        ),
        (torch.full((6,), -torch.inf), "has the value -inf, which is not finite"),
        (torch.full((6,), 1e300, dtype=torch.float64), "has the value 1e[+]300, which is not finite"),
    ],
)
def test_weights_are_finite_floats(saved, t5, values, message):
    rewrite(saved, tensors={NAME: values})
    with pytest.raises(CheckpointError, match=f"{NAME} {message}"):
        load(t5, saved)
    model = tiny_model(t5=tiny_t5(dtype=torch.float32))
    before = bits(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_weights(saved)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wider_and_narrower_floats_still_load(saved, t5):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        rewrite(saved, tensors={NAME: torch.arange(6).to(dtype)})
        assert load(t5, saved)[NAME].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_model_with_a_weight_that_is_not_finite_does_not_replace_a_checkpoint(saved, t5):
    before = (saved / WEIGHTS_NAME).read_bytes()
    model = tiny_model(t5=tiny_t5(dtype=torch.float32))
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["mnli"][3] = torch.nan
    with pytest.raises(ValueError, match=f"{NAME} has values that are not finite"):
        model.save_pretrained(saved)
    assert (saved / WEIGHTS_NAME).read_bytes() == before


SIZES = ("task_embedding_dim", "projected_task_embedding_dim", "task_hidden_dim", "reduction_factor")


@pytest.mark.parametrize("size", [10**7, 2**31 - 1, 2**31, 2**63, 10**30])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_that_the_tensors_do_not_have_allocates_nothing(saved, t5, field, size):
    description = described(saved)
    description["config"][field] = size
    rewrite(saved, description)
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load(t5, saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - made < 100_000, "KiB"


def test_sizes_that_overflow_only_together_are_named(saved, t5):
    description = described(saved)
    description["config"] |= dict.fromkeys(SIZES[:3], 2**31 - 1)
    rewrite(saved, description)
    with pytest.raises(CheckpointError, match="task_hidden_dim=2147483647|in this model"):
        load(t5, saved)


DEEP = '{"format_version": 1, "config": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested more than 16 deep"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested more than 16 deep"),
        ("[" + "1" * 5000 + "]", "is not JSON: Exceeds|must be a JSON object, got list"),
        ("[]", "must be a JSON object, got list"),
        ("NaN", "must be a JSON object, got float"),
        ("{", "is not JSON"),
        ('{"format_version": "' + "a" * 10**6 + '"}', "has format version 'aaa"),
    ],
)
def test_a_header_that_is_no_description(saved, t5, text, message):
    rewrite(saved, text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(t5, saved)
    assert len(str(caught.value)) < 2500


ODD = (None, True, 3, -1, 0, 1.5, 10**30, float("nan"), "", "\ud800", "a.b", [], [[]], {}, {"a": {}}, ["mnli"] * 2)
#: (where, values that are right there or are not read, the name that the message must have)
FIELDS = ["format_version", "base_model", "config", "sha256"]
CONFIG = [*SIZES, "tasks", "variant", "non_linearity", "add_layer_norm_before_adapter", "add_layer_norm_after_adapter"]
CONFIG += ["conditional_layer_norm", "unique_hyper_net", "efficient_unique_hyper_net", "unique_hyper_net_layer_norm"]
CONFIG += ["train_task_embeddings", "task_to_embeddings", "unfreeze_layer_norms", "unfreeze_lm_head"]
BASE = ["model_type", "d_model", "num_layers", "num_decoder_layers", "vocab_size", "frozen"]


@pytest.mark.parametrize(
    "path",
    [*((f,) for f in FIELDS), *(("config", f) for f in CONFIG), *(("base_model", f) for f in BASE)],
    ids=".".join,
)
def test_an_odd_value_is_refused_under_its_name_or_loads_right(saved, t5, path):
    whole, original = load(t5, saved), described(saved)
    held = load_file(saved / WEIGHTS_NAME)
    for value in ODD:
        description = copy.deepcopy(original)
        place = description
        for step in path[:-1]:
            place = place[step]
        before, place[path[-1]] = place[path[-1]], value
        if path != (DIGEST,):
            del description[DIGEST]
        save_file(held, saved / WEIGHTS_NAME, {"hyperformer": json.dumps(description)})
        try:
            found = load(t5, saved)
        except CheckpointError as error:
            names = {"format_version": "format version", "base_model": "model_type", "sha256": "SHA-256"}
            said = names.get(path[0], path[-1]) if len(path) == 1 else path[-1]
            structural = "of this model" in str(error) or "unknown to this model" in str(error)
            assert said in str(error) or structural or " in this model" in str(error), (value, str(error))
            continue
        # what loads is what the file says: the very value (True == 1), or one that no weight depends on
        assert value == before or path[-1] in UNREAD, (value, before)
        assert all(torch.equal(found[name], whole[name]) for name in whole)


#: With two flags, or None where the variant says it; and fields that this variant does not read.
UNREAD = {"variant", "unique_hyper_net", "efficient_unique_hyper_net", "conditional_layer_norm", "frozen"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mutation_of_the_description_is_refused_or_loads_what_it_says(source, tmp_path_factory, t5, data):
    folder = _scratch(source, tmp_path_factory)
    description = described(source)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in _places(description) if p]))
        place = description
        for step in path[:-1]:
            place = place[step]
        how = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            place[path[-1]] = data.draw(json_values)
        elif how == "remove":
            del place[path[-1]]
        elif isinstance(place, dict):
            place[data.draw(st.text(max_size=8))] = data.draw(json_values)
        else:
            place.append(data.draw(json_values))
    rewrite(folder, description)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = HyperFormerModel.from_pretrained(folder, t5=t5)
        except CheckpointError:
            assert not any(module._forward_hooks for module in t5.modules())
            return
    said, found = description["config"], model.hyperformer_config.to_dict()
    assert all(found[field] == value for field, value in said.items() if value is not None)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in load_file(folder / WEIGHTS_NAME).items() if name in weights)
    assert model(**batch(), task=said["tasks"][0]).logits.isfinite().all()
    model.unload()


def _scratch(source, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))
