"""Quantised T5s: those that pass gradients on are trained through, those that cut them are refused, and checkpoints go
between a T5 and its quantised forms."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.prepared import MIXED, close, logits
from support.t5s import batch, tiny_config, tiny_model, tiny_t5, train
from torch import nn
from transformers import T5ForSequenceClassification

from hyperformer_fast import HyperFormerModel, get_hyperformer_model
from hyperformer_fast.checkpoint import CheckpointError

SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128}
REFUSED = "no gradient flows through .* of this T5, as in one under torch's dynamic int8 quantisation"


def t5():
    return tiny_t5(dtype=torch.float32, **SIZES)


def replace_linears(t5, make, keep=("lm_head",)):
    for name, module in list(t5.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in keep:
            t5.set_submodule(name, make(module))
    return t5


class Int8(nn.Module):
    """Weights in int8 with a scale for each row, and a product in floating point."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def gradient(model):
    model.zero_grad()
    model(**batch(), task="mnli").loss.backward()
    return model.hypernetworks["encoder"].generator.weight.grad.clone()


def assert_trains(make):
    """The gradient is the one through linears in float that hold what the quantised ones are worth."""
    quantised, twin = make(t5()).train(), t5()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                worth = quantised.get_submodule(name)(torch.eye(module.in_features)).T
            module.weight = nn.Parameter(worth.clone())
    model = tiny_model(t5=quantised)
    got, want = gradient(model), gradient(tiny_model(t5=twin))
    assert (got - want).norm() < 1e-5 * want.norm()
    model.eval().generate(batch()["input_ids"], task="mnli", max_new_tokens=2)
    return model


def test_weights_in_int8_are_trained_through():
    model = assert_trains(lambda t5: replace_linears(t5, Int8))
    flags = [p.requires_grad for p in model.unload().parameters() if p.dtype == torch.int8]
    assert flags and not any(flags)


def test_torchao_is_trained_through():
    assert_trains(in_torchao)


def in_torchao(t5):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(t5, torchao.Int8WeightOnlyConfig())
    return t5


def in_bitsandbytes(t5, bits):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        sizes = (linear.in_features, linear.out_features, False)
        weight = linear.weight.detach().clone()
        if bits == 8:
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        return made

    # transformers leaves the head and T5's wo as they are, too
    return replace_linears(t5, make, ("lm_head", "wo")).to("cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_is_trained_through(bits):
    assert_trains(lambda t5: in_bitsandbytes(t5, bits))


def in_dynamic_int8(t5, linears=frozenset({nn.Linear})):
    if "fbgemm" not in torch.backends.quantized.supported_engines and torch.backends.quantized.engine == "none":
        pytest.skip("needs an engine for quantised linears, which this build of torch lacks")
    return torch.ao.quantization.quantize_dynamic(t5, set(linears), dtype=torch.qint8)


class Int8Tensor(torch.Tensor):
    """A weight in int8 under the name of a float32 one, as torchao makes them: it knows linear, detach and little
    else."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    def __tensor_flatten__(self):
        return ["q", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight = args[:2]
            return x @ (weight.q.to(x.dtype) * weight.scale).T
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(f"{function} of an Int8Tensor")


def in_int8_tensors(t5):
    for module in t5.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            q = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Tensor(q, scale), requires_grad=False)
    return t5


FORMS = {
    "float": lambda t5: t5,
    "int8 parameters": lambda t5: replace_linears(t5, Int8),
    "int8 tensors": in_int8_tensors,
    "dynamic int8": in_dynamic_int8,
    "torchao": in_torchao,
    "bitsandbytes 8": lambda t5: in_bitsandbytes(t5, 8),
    "bitsandbytes 4": lambda t5: in_bitsandbytes(t5, 4),
}
QUANTISED = [form for form in FORMS if form != "float"]
PAIRS = [*(("float", form) for form in QUANTISED), *((form, "float") for form in QUANTISED)]
PAIRS += [(form, form) for form in QUANTISED]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("there", "here"), PAIRS)
def test_checkpoints_go_between_a_t5_and_its_quantised_forms(tmp_path, there, here, tied):
    make = lambda form, seed=0: FORMS[form](tiny_t5(dtype=torch.float32, tied=tied, seed=seed, **SIZES))  # noqa: E731
    trained = tiny_model(t5=make(there))
    if there != "dynamic int8":
        train(trained)
    trained.save_pretrained(tmp_path)
    base, other = make(here), make(here, seed=9)
    served = tiny_model(t5=make(here))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = HyperFormerModel.from_pretrained(tmp_path, t5=base)
        served.load_weights(tmp_path)
    assert len(said) == 2 and all("make sure that this is the T5 it was trained on" in str(w.message) for w in said)
    for model in (loaded, served):
        for name, parameter in trained._trained_tensors().items():
            assert torch.equal(parameter, model._trained_tensors()[name])
        model.generate(batch()["input_ids"], task="mnli", max_new_tokens=2)
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="another T5"):
        HyperFormerModel.from_pretrained(tmp_path, t5=other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["int8 tensors", "dynamic int8", "torchao"])
def test_a_head_that_is_to_be_trained_must_not_be_quantised(form, tmp_path):
    message = "unfreeze_lm_head is True, but this T5's lm_head is quantised: quantise the T5 without its lm_head"
    config = tiny_config(unfreeze_lm_head=True)
    with pytest.raises(ValueError, match=message):
        get_hyperformer_model(FORMS[form](t5()), config)
    get_hyperformer_model(t5(), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        HyperFormerModel.from_pretrained(tmp_path, t5=FORMS[form](t5()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["int8 tensors", "dynamic int8", "torchao"])
def test_a_new_head_must_not_be_quantised_but_the_rest_may(form):
    classifier = lambda: T5ForSequenceClassification(tiny_t5().config).float().eval()  # noqa: E731
    with pytest.raises(ValueError, match="this T5's classification_head is quantised: quantise the T5 without its"):
        tiny_model(t5=FORMS[form](classifier()))
    head = classifier().classification_head
    quantised = FORMS[form](classifier())
    quantised.classification_head = head
    model = tiny_model(t5=quantised)
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert {name for name in model._trained_tensors() if "head" in name} == {
        f"t5.classification_head.{name}" for name, _ in head.named_parameters()
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("head", [True, False])
def test_torchs_dynamic_quantisation_is_refused_in_training_only(head):
    linears = {nn.Linear} if head else {"encoder.block.1.layer.1.DenseReluDense.wi"}
    model = tiny_model(t5=in_dynamic_int8(t5(), linears))
    with torch.no_grad():
        model(**batch(), task="mnli")
    assert model.generate(batch()["input_ids"], task="mnli", max_new_tokens=2).shape[0] == 4
    with pytest.raises(RuntimeError, match=REFUSED):
        model(**batch(), task="mnli")
    for parameter in (*model.hypernetworks.parameters(), *model.task_embeddings.parameters()):
        parameter.requires_grad_(False)
    model(**batch(), task="mnli").loss.backward()


class Cut(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return (x @ self.weight.T).detach()


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("encoder.block.0.layer.1.DenseReluDense.wo", "the feed_forward of encoder block 0"),
        ("decoder.block.1.layer.0.SelfAttention.o", "the self_attention of decoder block 1"),
        ("lm_head", "the head"),
    ],
)
def test_what_passes_nothing_on_is_named(place, where):
    base = t5()
    base.set_submodule(place, Cut(base.get_submodule(place)))
    model = tiny_model(t5=base)
    with torch.no_grad():
        model(**batch(), task="mnli")
    with pytest.raises(RuntimeError, match=f"no gradient flows through {where} of this T5"):
        model(**batch(), task="mnli")


def test_a_t5_quantised_between_two_trainings_is_seen():
    """bitsandbytes packs 4-bit weights for inference on a CPU, and then cuts gradients."""
    model = tiny_model(t5=t5())
    model(**batch(), task="mnli").loss.backward()
    name = "decoder.block.1.layer.2.DenseReluDense.wi"
    model.generate(batch()["input_ids"], task="mnli", max_new_tokens=2)
    model.t5.set_submodule(name, NoDerivative(model.t5.get_submodule(name)))
    with pytest.raises(RuntimeError, match=REFUSED):
        model(**batch(), task="mnli")


class NoDerivative(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return torch.ops.hyperformer_fast_tests.no_derivative(x, self.weight)


torch.library.define("hyperformer_fast_tests::no_derivative", "(Tensor x, Tensor w) -> Tensor")


@torch.library.impl("hyperformer_fast_tests::no_derivative", "CPU")
def _no_derivative(x, w):
    with torch._C._AutoDispatchBelowAutograd():  # as a kernel in C++ runs
        return x @ w.T


@pytest.fixture(params=[form for form in QUANTISED if form != "dynamic int8"])
def serving(request):
    """A model in evaluation whose T5 was quantised before, and rows of several lengths, each of another task."""
    base = FORMS[request.param](tiny_t5(dtype=torch.float32, initializer_factor=2.0, **SIZES)).eval()
    model = tiny_model(t5=base).eval()
    given = batch(B=6)
    for row in range(6):
        given["attention_mask"][row, 7 - row % 4 :] = 0
    return model, {name: given[name] for name in ("input_ids", "attention_mask")}


NAMES = (MIXED * 2)[:6]


def test_a_mixed_batch_is_answered_as_single_calls_are(serving):
    model, inputs = serving
    start = torch.zeros(6, 1, dtype=torch.long)
    for prepares in (False, True):
        if prepares:
            model.prepare()
        together = logits(model, NAMES, **inputs, decoder_input_ids=start)
        greedy = model.generate(**inputs, task=NAMES, max_new_tokens=4)
        beams = model.generate(**inputs, task=NAMES, max_new_tokens=4, num_beams=3)
        for task in dict.fromkeys(NAMES):
            rows = [row for row, name in enumerate(NAMES) if name == task]
            some = {name: value[rows] for name, value in inputs.items()}
            close(logits(model, task, **some, decoder_input_ids=start[rows]), together[rows])
            for tokens, options in ((greedy, {}), (beams, {"num_beams": 3})):
                alone = model.generate(**some, task=task, max_new_tokens=4, **options)
                assert torch.equal(alone, tokens[rows, : alone.shape[1]]), task
    assert len(torch.unique(together, dim=0)) == 6


def test_what_is_kept_beside_a_quantised_t5_is_exact(serving):
    """Adapters are in float32, and are the bits of those beside the T5 in floating point."""
    model, inputs = serving
    plain = tiny_model(t5=tiny_t5(dtype=torch.float32, initializer_factor=2.0, **SIZES)).eval()
    for each in (model, plain):
        each.prepare()
    kept, exact = model._prepared._entry, plain._prepared._entry
    for name, stack in exact.stacks.items():
        assert torch.equal(kept.stacks[name].packed, stack.packed)
    assert model.memory_footprint().prepared == plain.memory_footprint().prepared
    model.add_task("new", init_from="cola")
    assert torch.equal(logits(model, "new", **inputs, decoder_input_ids=inputs["input_ids"]),
                       logits(model, "cola", **inputs, decoder_input_ids=inputs["input_ids"]))  # fmt: skip


@pytest.mark.parametrize("form", ["int8 parameters", "int8 tensors", "torchao"])
def test_the_footprint_is_that_of_the_quantised_weights(form):
    make = lambda form: tiny_model(t5=FORMS[form](tiny_t5(dtype=torch.float32, **SIZES)))  # noqa: E731
    plain, quantised = (make(each) for each in ("float", form))
    linears = [m.weight for name, m in plain.t5.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    # three of four bytes, less a scale for each row
    most = sum(3 * weight.numel() for weight in linears)
    saved = plain.memory_footprint().t5 - quantised.memory_footprint().t5
    assert 0.8 * most < saved <= most + 3 * plain.t5.lm_head.weight.numel()
