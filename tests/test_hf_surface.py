"""What transformers, accelerate and PEFT do with a model: each works, or says in one sentence why not."""

from __future__ import annotations

import copy

import pytest
import torch
from support.t5s import TASKS, bare_copy, batch, tiny_config, tiny_model, tiny_t5, train
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5EncoderModel, T5Model
from transformers.models.t5.modeling_t5 import (
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
)

from hyperformer_fast import HyperFormerModel, get_hyperformer_model

IDS = batch()["input_ids"]


def test_what_trainer_asks_of_a_model():
    import inspect

    model = tiny_model()
    names = list(inspect.signature(model.forward).parameters)
    assert {"input_ids", "attention_mask", "decoder_input_ids", "labels", "task", "task_index"} <= set(names)
    assert HyperFormerModel.main_input_name == "input_ids"
    assert model.config is model.t5.config and model.generation_config is model.t5.generation_config
    assert model.device.type == "cpu" and model.dtype == torch.float64 and model.can_generate()
    labels = batch()["labels"]
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(shifted[:, 1:], labels[:, :-1]) and not shifted[:, 0].any()


@pytest.mark.parametrize("kind", ["t5", "encoder", "mt5"])
def test_other_t5s(kind):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    inputs = {"input_ids": batch()["input_ids"]}
    if kind == "mt5":
        t5 = MT5ForConditionalGeneration(MT5Config(**sizes, decoder_start_token_id=0))
        inputs["labels"] = batch()["labels"]
    elif kind == "t5":
        t5 = T5Model(T5Config(**sizes))
        inputs["decoder_input_ids"] = batch()["labels"]
    else:
        t5 = T5EncoderModel(T5Config(**sizes))
    t5.eval()
    plain = t5(**inputs)
    model = tiny_model(t5=t5)
    assert list(model.hypernetworks) == (["encoder"] if kind == "encoder" else ["encoder", "decoder"])
    hidden = "last_hidden_state" if kind != "mt5" else "logits"
    a, b = model(**inputs, task="mnli")[hidden], model(**inputs, task="cola")[hidden]
    assert not torch.allclose(a, b) and not torch.allclose(a, plain[hidden])
    assert torch.equal(model.unload()(**inputs)[hidden], plain[hidden])


POSITIONS = {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([3, 1, 4, 2])}
HEADS = {
    "classification_head": (T5ForSequenceClassification, {"labels": torch.tensor([0, 1, 1, 0])}),
    "classifier": (T5ForTokenClassification, {"labels": torch.ones(4, 7, dtype=torch.long)}),
    "qa_outputs": (T5ForQuestionAnswering, POSITIONS),
}


def t5_with(head):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return HEADS[head][0](T5Config(**sizes, **ids, num_labels=2)).double().eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_is_trained_saved_and_given_back(head, tmp_path):
    t5 = t5_with(head)
    before = {name: p.detach().clone() for name, p in t5.named_parameters()}
    model = tiny_model(t5=t5)
    ids = IDS.clone()
    ids[:, -1] = 1  # sequence classification reads the last position that ends a sentence
    inputs = {"input_ids": ids, "task": ["mnli", "cola", "mnli", "stsb"], **HEADS[head][1]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    heads = {name for name in before if name.startswith(head)}
    assert heads and all(not torch.equal(dict(t5.named_parameters())[name], before[name]) for name in heads)
    assert model.parameter_count().t5_trained == sum(p.numel() for p in t5.parameters() if p.requires_grad)

    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=t5_with(head)).eval()
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    assert all(torch.equal(p, before[name]) for name, p in model.unload().named_parameters())
    with pytest.raises(ValueError, match="has no lm_head"):
        get_hyperformer_model(t5, tiny_config(unfreeze_lm_head=True))


def test_what_stands_for_the_t5():
    model = tiny_model()
    t5 = model.t5
    assert model.get_encoder() is t5.encoder and model.get_decoder() is t5.decoder
    assert model.get_output_embeddings() is t5.lm_head and model.name_or_path == t5.name_or_path
    ours = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("t5."))
    assert model.num_parameters() == ours + t5.num_parameters()
    assert model.num_parameters(only_trainable=True) == model.parameter_count().trained
    assert model.num_parameters(exclude_embeddings=True) == ours + t5.num_parameters(exclude_embeddings=True)
    for stack in (model.get_encoder(), model.get_decoder()):
        with pytest.raises(RuntimeError, match="was called by itself, so they have no weights"):
            stack(IDS)


def test_a_t5_without_weights_is_refused():
    with torch.device("meta"):
        t5 = tiny_t5()
    with pytest.raises(ValueError, match="shared.weight is on the meta device.*load its weights first"):
        get_hyperformer_model(t5, tiny_config())
    assert all(p.requires_grad for p in t5.parameters())


def test_an_offloaded_t5_computes_where_it_is_fetched_to():
    accelerate = pytest.importorskip("accelerate")
    t5 = tiny_t5()
    other = tiny_model(t5=copy.deepcopy(t5), unfreeze_layer_norms=False)
    plain = t5(**batch()).logits
    accelerate.cpu_offload(t5, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="layer_norm.weight is offloaded, and would forget what it learns"):
        get_hyperformer_model(t5, tiny_config())
    model = tiny_model(t5=t5, unfreeze_layer_norms=False)
    for one in (model, other):
        train(one)
    out, expected = model(**batch(), task="cola"), other(**batch(), task="cola")
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-12, atol=1e-12)
    options = {"task": TASKS + ["mnli"], "max_new_tokens": 3}
    assert torch.equal(model.generate(IDS, **options), other.generate(IDS, **options))
    torch.testing.assert_close(model.unload()(**batch()).logits, plain, rtol=1e-12, atol=1e-12)


def test_offloading_the_hypernetworks_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(unfreeze_layer_norms=False)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        RuntimeError, match="the hypernetworks are offloaded.*offload the T5 .* before it gets adapters"
    ):
        model(**batch(), task="mnli")


def test_export():
    model = tiny_model(t5=tiny_t5(num_layers=1, num_decoder_layers=1))
    inputs = {**batch(), "task": ["cola", "mnli", "mnli", "stsb"], "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_is_refused():
    model = tiny_model(tasks=["only"])
    with pytest.raises(RuntimeError, match="torch.jit.trace would take .* use torch.compile or torch.export"):
        torch.jit.trace(model, (IDS, torch.ones_like(IDS), IDS), strict=False)
    model(**batch())


@pytest.mark.filterwarnings("ignore:.*generation_config")
@pytest.mark.parametrize("assistant", ["itself", "another", "a T5"])
def test_assisted_generation(assistant):
    model = tiny_model()
    helper = {"itself": model, "another": tiny_model(t5=tiny_t5(seed=1)), "a T5": tiny_t5(seed=1)}[assistant]
    for task in ("mnli", ["cola"]):
        expected = model.generate(IDS[:1], task=task, max_new_tokens=8)
        assert torch.equal(model.generate(IDS[:1], task=task, max_new_tokens=8, assistant_model=helper), expected)


def test_an_assistant_that_cannot_know_the_task_is_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match="can assist the generation of another HyperFormerModel only"):
        tiny_t5().generate(IDS[:1], max_new_tokens=4, assistant_model=model)
    with pytest.raises(ValueError, match=r"the assistant must have this model's tasks"):
        model.generate(IDS[:1], task="mnli", assistant_model=tiny_model(tasks=TASKS[::-1]))


class KeywordsOnly(torch.nn.Module):
    """As PEFT's wrapper of a T5."""

    def __init__(self, t5):
        super().__init__()
        self.base_model = t5

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, **kwargs):
        return self.base_model(**kwargs)

    def generate(self, **kwargs):
        return self.base_model.generate(**kwargs)


def test_generate_by_position_around_a_wrapped_t5():
    model, wrapped = tiny_model(), tiny_model(t5=KeywordsOnly(tiny_t5()))
    expected = model.generate(IDS, task="mnli", max_new_tokens=3)
    assert torch.equal(wrapped.generate(IDS, task="mnli", max_new_tokens=3), expected)
    with pytest.raises(TypeError, match="by position, and the rest by name"):
        model.generate(IDS, None, None, None, None, task="mnli")
    with pytest.raises(TypeError, match="inputs is given twice"):
        model.generate(IDS, inputs=IDS, task="mnli")


def test_around_and_within_peft():
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    expected = tiny_model().generate(IDS, task="mnli", max_new_tokens=3)
    model = tiny_model(t5=peft.get_peft_model(tiny_t5(), peft.LoraConfig(**config)))
    assert torch.equal(model.generate(IDS, task="mnli", max_new_tokens=3), expected)
    model.unload()
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**config))
    assert torch.equal(model.generate(input_ids=IDS, task="mnli", max_new_tokens=3), expected)
    model(**batch(), task="mnli").loss.backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_a_bare_copy_has_no_adapters_left():
    model = tiny_model()
    torch.testing.assert_close(bare_copy(model.t5)(**batch()).logits, model.unload()(**batch()).logits)


def test_a_replica_without_parameters_takes_task_names(monkeypatch):
    """``nn.DataParallel`` gives its replicas plain attributes in place of parameters."""
    model = tiny_model().eval()
    expected = model(**batch(), task=TASKS[0]).logits
    monkeypatch.setattr(model.task_embeddings, "parameters", lambda recurse=True: iter(()))
    monkeypatch.setattr(model, "_is_replica", True, raising=False)
    assert torch.equal(model(**batch(), task=TASKS[0]).logits, expected)


@pytest.mark.parametrize("task", [torch.tensor([0, 1, 2, 0]), [0, 1, 2, 0], 1], ids=["tensor", "list", "one"])
def test_numbers_for_names_are_refused_with_the_cure(task):
    """As a ClassLabel column named task gives them."""
    model = tiny_model()
    for call in (lambda: model(**batch(), task=task), lambda: model.generate(IDS, task=task)):
        with pytest.raises(
            ValueError, match="task takes names, got the numbers .*task_index=.*mnli, stsb, cola.*int2str"
        ):
            call()


@pytest.mark.parametrize("tied", [True, False])
def test_ties_come_back(tied):
    """After accelerate has put other tensors in the T5's place, as its FSDP does."""
    model = tiny_model(t5=tiny_t5(tied=tied), unfreeze_lm_head=True)
    t5 = model.t5
    for module in (t5.shared, t5.encoder.embed_tokens, t5.decoder.embed_tokens, t5.lm_head):
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
    model.tie_weights()
    assert t5.encoder.embed_tokens.weight is t5.shared.weight is t5.decoder.embed_tokens.weight
    assert (t5.lm_head.weight is t5.shared.weight) is tied
    again = copy.deepcopy(model)
    assert (again.t5.lm_head.weight is again.t5.shared.weight) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_ties_stay_where_a_state_dict_is_assigned(tied):
    model = tiny_model("finetuning", t5=tiny_t5(tied=tied))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    t5 = model.t5
    assert t5.encoder.embed_tokens.weight is t5.shared.weight is t5.decoder.embed_tokens.weight
    assert (t5.lm_head.weight is t5.shared.weight) is tied


def test_nothing_initialises_the_model_again():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()
    model.post_init()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
