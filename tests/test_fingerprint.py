"""A checkpoint knows the T5 it was trained on by all its frozen values, in any precision it may be loaded in."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.old_files import as_version_0_1_0
from support.t5s import batch, bits, tiny_config, tiny_model, tiny_t5

from hyperformer_fast import HyperFormerModel, fingerprint, get_hyperformer_model
from hyperformer_fast.checkpoint import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base(dtype=torch.float32, change=None, **fields):
    """The T5; ``change`` happens to its float64 original, as another training would."""
    t5 = tiny_t5(**fields)
    if change is not None:
        with torch.no_grad():
            change(t5)
    return t5.to(dtype)


@pytest.fixture
def saved(tmp_path):
    tiny_model(t5=base()).save_pretrained(tmp_path)
    return tmp_path


def retrain_rows(t5):
    t5.shared.weight[20:28] += 0.1 * torch.randn(8, t5.config.d_model)


def one_value(t5):
    t5.encoder.block[1].layer[0].SelfAttention.k.weight[3, 4] *= 1 + 2**-20


def swap_rows(t5):
    t5.shared.weight[[5, 6]] = t5.shared.weight[[6, 5]]


def negate_rows(t5):
    t5.decoder.block[0].layer[2].DenseReluDense.wo.weight[2:4].neg_()


CHANGES = {"shared.weight": retrain_rows, "SelfAttention.k.weight": one_value}
CHANGES |= {"shared.weight ": swap_rows, "DenseReluDense.wo.weight": negate_rows}


@pytest.mark.parametrize("name", CHANGES)
def test_a_few_other_values_make_another_t5(saved, name):
    message = f"another T5: its frozen .*{name.strip()} has other values"
    with pytest.raises(CheckpointError, match=message):
        HyperFormerModel.from_pretrained(saved, t5=base(change=CHANGES[name]))
    with pytest.raises(CheckpointError, match=message):
        get_hyperformer_model(base(change=CHANGES[name]), tiny_config()).load_weights(saved)


@pytest.mark.parametrize("there", DTYPES)
@pytest.mark.parametrize("here", DTYPES)
def test_a_t5_is_itself_in_every_precision_and_eight_rows_make_another(tmp_path, here, there):
    tiny_model(t5=base(there)).save_pretrained(tmp_path)
    incomparable = {here, there} == {torch.bfloat16, torch.float16}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        HyperFormerModel.from_pretrained(tmp_path, t5=base(here))
    assert len(said) == incomparable and all("make sure that this is the T5" in str(w.message) for w in said)
    if incomparable:  # neither holds all that the other has; no digest can tell, and that is said
        with pytest.warns(UserWarning, match="cannot be compared value by value"):
            HyperFormerModel.from_pretrained(tmp_path, t5=base(here, retrain_rows))
    else:
        with pytest.raises(CheckpointError, match="another T5: its frozen shared.weight has"):
            HyperFormerModel.from_pretrained(tmp_path, t5=base(here, retrain_rows))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rounded_and_widened_again_is_the_same_t5_on_either_side(tmp_path, half):
    rounded = lambda: base().to(half).float()  # noqa: E731
    for name, there, here in (("a", base, rounded), ("b", rounded, base), ("c", lambda: base(half), rounded)):
        tiny_model(t5=there()).save_pretrained(tmp_path / name)
        HyperFormerModel.from_pretrained(tmp_path / name, t5=here())
        other = base(change=retrain_rows).to(half).float()
        with pytest.raises(CheckpointError, match="another T5"):
            HyperFormerModel.from_pretrained(tmp_path / name, t5=other)


def test_half_precision_with_some_weights_kept_in_float32(saved):
    """As transformers loads a T5 in float16."""

    def mixed(change=None):
        t5 = base(torch.float16, change)
        for name, module in t5.named_modules():
            if name.endswith(".wo"):
                module.weight.data = dict(base(change=change).named_modules())[name].weight.data
        return t5

    HyperFormerModel.from_pretrained(saved, t5=mixed())
    for change in (retrain_rows, negate_rows, one_value):
        try:
            HyperFormerModel.from_pretrained(saved, t5=mixed(change))
        except CheckpointError as error:
            assert "another T5" in str(error)
        else:
            assert change is one_value, "it is lost in rounding to float16"


def test_an_old_file_has_one_number_per_weight_and_is_checked_by_that(saved):
    as_version_0_1_0(saved)
    HyperFormerModel.from_pretrained(saved, t5=base())
    HyperFormerModel.from_pretrained(saved, t5=base(change=retrain_rows))
    with pytest.raises(CheckpointError, match=r"another T5: its frozen .* has .* where this one's has"):
        HyperFormerModel.from_pretrained(saved, t5=base(seed=9))


def test_the_t5s_trained_parameters_do_not_matter(saved):
    def trained(t5):
        t5.encoder.final_layer_norm.weight += 1

    HyperFormerModel.from_pretrained(saved, t5=base(change=trained))


def quantised(t5):
    # torch's dynamic int8 stands for all that has no parameters to read
    return torch.ao.quantization.quantize_dynamic(t5, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_t5_is_compared_by_the_weights_that_can_be_read(tied):
    # a tied head gets a weight of its own when it is quantised
    here = lambda change=None: fingerprint.frozen(base(change=change, tied=tied), ())  # noqa: E731
    there = lambda change=None: fingerprint.frozen(quantised(base(change=change, tied=tied)), ())  # noqa: E731
    blind = sorted(name for name, weight in there().items() if weight is None)
    assert 0 < len(blind) < len(there()) and "lm_head.weight" in blind
    for ours, theirs in ((here, there), (there, here), (there, there)):
        record, sample = fingerprint.record(theirs()), fingerprint.sample(theirs())
        assert fingerprint.difference(ours(), sample, record) == (None, blind)
        assert "shared.weight" in fingerprint.difference(ours(retrain_rows), sample, record)[0]
    # an old file has no names
    assert fingerprint.difference(there(), fingerprint.sample(here()), None) == (None, blind)


class Renamed(torch.nn.Module):
    """A linear under a quantiser that gives its weight other names, as parameters or as buffers."""

    def __init__(self, how):
        super().__init__()
        if how == "parameter":
            self.W_q = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
        else:
            self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


@pytest.mark.parametrize("how", ["parameter", "buffer"])
def test_a_weight_under_another_name_is_said_not_to_be_compared(how):
    t5, name = base(), "encoder.block.1.layer.1.DenseReluDense.wi"
    t5.set_submodule(name, Renamed(how))
    here, there = fingerprint.frozen(t5, ()), fingerprint.frozen(base(), ())
    names = sorted({f"{name}.weight", *([f"{name}.W_q"] if how == "parameter" else ())})
    for ours, theirs in ((here, there), (there, here)):
        found = fingerprint.difference(ours, fingerprint.sample(theirs), fingerprint.record(theirs))
        assert found == (None, names)


def test_an_untied_head_beside_quantised_embeddings_is_said_not_to_be_compared():
    t5 = base()
    for module in {t5.shared, t5.encoder.embed_tokens, t5.decoder.embed_tokens}:
        module.weight = torch.nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    here, there = fingerprint.frozen(t5, ()), fingerprint.frozen(base(), ())
    names = {"shared.weight", *(here.keys() - there.keys())}
    assert "lm_head.weight" in names and here["lm_head.weight"] is not None
    for ours, theirs in ((here, there), (there, here)):
        found = fingerprint.difference(ours, fingerprint.sample(theirs), fingerprint.record(theirs))
        assert found == (None, sorted(names))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("make", [lambda t5: t5, quantised])
def test_a_quantised_t5_of_another_architecture_is_refused(make):
    here, there = fingerprint.frozen(quantised(base(gated=True)), ()), fingerprint.frozen(make(base()), ())
    for ours, theirs in ((here, there), (there, here)):
        found = fingerprint.difference(ours, fingerprint.sample(theirs), fingerprint.record(theirs))
        assert "is frozen in one of the two only" in found[0]


def test_weights_that_are_not_in_memory_are_said_not_to_be_compared(saved):
    t5 = base()
    weights = fingerprint.frozen(t5.to("meta"), ())
    assert set(weights.values()) == {None}
    assert fingerprint.sample(weights).isnan().all() and set(fingerprint.record(weights).values()) == {""}


@pytest.fixture
def read(monkeypatch):
    """Names the precisions of the weights that are read."""
    done, compute = [], fingerprint._compute

    def watched(weight, precision, through):
        done.append(precision)
        return compute(weight, precision, through)

    monkeypatch.setattr(fingerprint, "_compute", watched)
    return done


def test_digests_are_computed_once_until_a_weight_changes(tmp_path, read):
    model = tiny_model(t5=base())
    model.save_pretrained(tmp_path)
    count = len(fingerprint.frozen(model.t5, model._snapshot.trained))
    assert sorted(map(str, read)) == sorted(
        ["torch.float32"] * count + ["torch.bfloat16"] * count + ["torch.float16"] * count
    )
    read.clear()
    model(**batch(), task="mnli").loss.backward()
    model.save_pretrained(tmp_path)
    model.load_weights(tmp_path)
    assert not read
    with torch.no_grad():
        model.t5.shared.weight[9] += 1
    with pytest.raises(CheckpointError, match="shared.weight has"):
        model.load_weights(tmp_path)
    assert read
    model.save_pretrained(tmp_path)
    model.load_weights(tmp_path)
    model.t5.shared.weight.data.mul_(2)
    with pytest.raises(CheckpointError, match="shared.weight has"):
        model.load_weights(tmp_path)


def test_loading_in_the_same_precision_reads_each_weight_once(saved, read):
    t5 = base()
    HyperFormerModel.from_pretrained(saved, t5=t5)
    assert set(read) == {torch.float32} and len(read) == len(set(read)) * (len(list(t5.parameters())) - norms(t5))


def test_rows_written_past_the_version_are_seen_by_a_process_that_knows_the_old_ones(tmp_path):
    """Writing through ``.data`` does not change a parameter's version."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    t5 = model.unload()
    version = t5.shared.weight._version
    t5.shared.weight.data[3:5, 1:] = torch.randn_like(t5.shared.weight[3:5, 1:])
    assert t5.shared.weight._version == version
    with pytest.raises(CheckpointError, match="shared.weight"):
        HyperFormerModel.from_pretrained(tmp_path, t5=t5)


def test_an_observer_is_no_hidden_weight(saved):
    t5 = base()
    t5.encoder.observer = torch.nn.Module()
    t5.encoder.observer.register_buffer("count", torch.zeros(()))
    assert fingerprint.frozen(t5, ()).keys() == fingerprint.frozen(base(), ()).keys()


def norms(t5) -> int:
    return sum(name.endswith("layer_norm.weight") for name, _ in t5.named_parameters())


def test_chunks_and_layouts_do_not_matter_but_the_shape_does(monkeypatch):
    weight = torch.randn(37, 29)
    whole = fingerprint._compute(weight, torch.bfloat16, None)
    monkeypatch.setattr(fingerprint, "_CHUNK", 10)
    assert fingerprint._compute(weight, torch.bfloat16, None) == whole
    assert fingerprint._compute(weight.T.contiguous().T, torch.bfloat16, None) == whole
    assert fingerprint._compute(weight.reshape(29, 37), torch.bfloat16, None) != whole
    assert fingerprint._compute(weight, torch.bfloat16, torch.float16) != whole


def test_a_large_t5_shows_progress(monkeypatch, saved):
    from transformers.utils import logging

    bars = []

    def bar(*args, **options):
        bars.append(options)
        return made(*args, **{**options, "disable": True})

    made = logging.tqdm
    monkeypatch.setattr(logging, "tqdm", bar)
    HyperFormerModel.from_pretrained(saved, t5=base())
    assert [options["disable"] for options in bars] == [True], "a small one is done before a bar is drawn"
    monkeypatch.setattr(fingerprint, "_SHOW_PROGRESS", 1000)
    t5 = base()
    HyperFormerModel.from_pretrained(saved, t5=t5)
    assert bars[-1]["disable"] is None, "drawn on a terminal"
    frozen = [p for name, p in t5.named_parameters() if not name.endswith("layer_norm.weight")]
    assert bars[-1]["total"] == sum(p.numel() * 4 for p in frozen)


def test_nothing_of_the_t5_is_changed_by_looking(saved):
    t5 = base()
    before = bits(t5)
    weights = fingerprint.frozen(t5, ())
    fingerprint.record(weights)
    assert all(torch.equal(p, before[name]) for name, p in t5.named_parameters())
