"""The loss of a T5 with a frozen head, without logits: the same numbers, and no answer that is silently another."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support.runs import losses, small_trainer, trained
from support.t5s import LAYERS, TASKS, batch, tiny_config, tiny_model, tiny_t5
from torch import nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.frozen_head import NOT_COMPUTED, LogitsNotComputed
from hyperformer_fast.fusion import AUTO_PIECES
from hyperformer_fast.training import HyperFormerTrainer

MIXED = ["mnli", "stsb", "cola", "mnli"]


def some_labels():
    inputs = batch()
    inputs["labels"][1, 2:] = -100
    return inputs


def another_t5(kind, config):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": LAYERS["encoder"],
        "num_decoder_layers": LAYERS["decoder"], "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0,
    }  # fmt: skip
    return kind(config(**fields)).double()


T5S = {
    "T5": tiny_t5,
    "T5 v1.1": lambda: tiny_t5(gated=True, tied=False),
    "dropout": lambda: tiny_t5(dropout=0.1),
    "mT5": lambda: another_t5(MT5ForConditionalGeneration, MT5Config),
    "UMT5": lambda: another_t5(UMT5ForConditionalGeneration, UMT5Config),
}


def loss_and_gradients(model, output_logits, **arguments):
    model.zero_grad()
    torch.manual_seed(5)
    out = model(**{**some_labels(), **arguments}, task=MIXED, output_logits=output_logits)
    out[0].backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of_the_head(model):
    """The numbers of rows that the head multiplies from now on, watched without a hook."""
    seen, plain = [], nn.functional.linear

    def linear(x, weight, bias=None):
        if weight is model.t5.lm_head.weight:
            seen.append(x.numel() // x.shape[-1])
        return plain(x, weight, bias)

    return seen, linear


@pytest.mark.parametrize("kind", T5S)
@pytest.mark.parametrize(("smoothing", "items"), [(0.0, None), (0.1, None), (0.1, torch.tensor(11))], ids=str)
def test_the_loss_is_that_of_the_logits(kind, smoothing, items):
    model = tiny_model(t5=T5S[kind]()).train()
    arguments = {"smoothing": smoothing, "num_items_in_batch": items}
    (found, gradients), (wanted, right) = (loss_and_gradients(model, each, **arguments) for each in (False, True))
    assert found.logits is NOT_COMPUTED and wanted.logits.shape == (4, 5, 64)
    torch.testing.assert_close(found.loss, wanted.loss, check_dtype=False)
    torch.testing.assert_close(gradients, right)
    if items is None:
        smoother = LabelSmoother(smoothing)({"logits": wanted.logits}, some_labels()["labels"])
        torch.testing.assert_close(found.loss, smoother, check_dtype=False)
    torch.testing.assert_close(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state)


def test_the_decoders_input_and_the_caches_stay_the_callers():
    model = tiny_model().train()
    shifted = model.prepare_decoder_input_ids_from_labels(some_labels()["labels"])
    own = shifted.clone()
    own[:, 2] = 9
    for arguments in ({"decoder_input_ids": own}, {"decoder_input_ids": shifted, "use_cache": True}):
        found, wanted = (loss_and_gradients(model, each, **arguments)[0] for each in (False, True))
        torch.testing.assert_close(found.loss, wanted.loss)
        assert (found.past_key_values is None) == ("use_cache" not in arguments)
    embedded = model.t5.shared(own).detach()
    found, wanted = (loss_and_gradients(model, each, decoder_inputs_embeds=embedded)[0] for each in (False, True))
    torch.testing.assert_close(found.loss, wanted.loss)
    found, wanted = (loss_and_gradients(model, each, return_dict=False)[0] for each in (False, True))
    torch.testing.assert_close(found[0], wanted[0])
    assert type(found) is tuple and found[1] is NOT_COMPUTED
    torch.testing.assert_close(found[-1], wanted[-1])
    hidden = loss_and_gradients(model, False, output_hidden_states=True, output_attentions=True)[0]
    assert len(hidden.decoder_hidden_states) == LAYERS["decoder"] + 1 and len(hidden.to_tuple()) == 8
    assert hidden.to_tuple()[0] is hidden.loss and hidden[1] is NOT_COMPUTED


def test_the_head_multiplies_no_rows(monkeypatch):
    model = tiny_model().train()
    seen, linear = rows_of_the_head(model)
    monkeypatch.setattr(nn.functional, "linear", linear)
    loss_and_gradients(model, False)
    assert seen == [0]
    loss_and_gradients(model, True)
    assert seen == [0, 20]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.argmax(-1), lambda x: x.shape, lambda x: x[0], lambda x: x + 1, lambda x: 2 * x, lambda x: x == x,
        lambda x: list(x), len, bool, float, lambda x: torch.argmax(x, -1), lambda x: torch.softmax(x, -1),
        lambda x: nn.functional.cross_entropy(x, torch.zeros(4)), lambda x: x.detach().cpu(), lambda x: x > 0,
    ],
)  # fmt: skip
def test_whoever_reads_the_logits_is_told(use):
    out = tiny_model().train()(**some_labels(), task="cola", output_logits=False)
    with pytest.raises(LogitsNotComputed, match="the logits were not computed: .* output_logits=True"):
        use(out.logits)


def test_what_stands_for_the_logits_is_one_object():
    for copied in (copy.copy(NOT_COMPUTED), copy.deepcopy(NOT_COMPUTED), pickle.loads(pickle.dumps(NOT_COMPUTED))):
        assert copied is NOT_COMPUTED
    assert "not computed" in repr(Seq2SeqLMOutput(loss=torch.zeros(()), logits=NOT_COMPUTED))
    assert not hasattr(NOT_COMPUTED, "shape")


class _OwnT5(T5ForConditionalGeneration):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = out.logits.square().mean()
        return out


def _with_hook(model):
    model.t5.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def _with_pre_hook(model):
    model.t5.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _with_hook_of_the_t5(model):
    model.t5.register_forward_hook(lambda module, args, out: out)


def _with_another_head(model):
    model.t5.lm_head = nn.Linear(32, 64, bias=False).double().requires_grad_(False)


def _with_a_bias(model):
    model.t5.lm_head.bias = nn.Parameter(torch.randn(64).double(), requires_grad=False)


def _with_another_forward(model):
    plain = model.t5.lm_head.forward
    model.t5.lm_head.forward = lambda x: 2 * plain(x)


def _unfrozen(model):
    model.t5.lm_head.weight.requires_grad_(True)


CHANGES = {
    "has hooks": _with_hook, "has  hooks": _with_pre_hook, "forward hooks": _with_hook_of_the_t5,
    "put in, or resized": _with_another_head, "not a plain linear": _with_a_bias, "was replaced": _with_another_forward,
    "is trained": _unfrozen,
}  # fmt: skip


@pytest.mark.parametrize("why", CHANGES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_head_that_is_not_plain_keeps_its_logits(why, smoothing):
    model = tiny_model(t5=tiny_t5(tied=False)).train()
    CHANGES[why](model)
    assert " ".join(why.split()) in model.why_logits()
    found, _ = loss_and_gradients(model, False, smoothing=smoothing)
    labels = some_labels()["labels"]
    torch.testing.assert_close(
        found.loss, LabelSmoother(smoothing)({"logits": found.logits}, labels), check_dtype=False
    )


def test_t5s_that_train_their_head_or_have_another_keep_their_path():
    assert "is trained" in tiny_model(unfreeze_lm_head=True).why_logits()
    assert "is trained" in tiny_model("finetuning").why_logits()
    own = _OwnT5(tiny_t5().config).double()
    model = get_hyperformer_model(own, tiny_config())
    assert "another loss" in model.why_logits()
    out = model.train()(**some_labels(), task="cola", output_logits=False)
    assert torch.equal(out.loss, out.logits.square().mean())
    from transformers import T5EncoderModel

    model = get_hyperformer_model(T5EncoderModel(tiny_t5().config), tiny_config())
    assert "has no lm_head" in model.why_logits()


def test_a_class_whose_forward_somebody_replaced_keeps_it(monkeypatch):
    model, plain = tiny_model().train(), T5ForConditionalGeneration.forward

    def forward(self, *args, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", forward)
    assert "the forward of T5ForConditionalGeneration was replaced" in model.why_logits()
    assert model(**some_labels(), task="cola", output_logits=False).logits.shape == (4, 5, 64)


def test_smoothing_needs_tokens_or_classes():
    from transformers import T5ForSequenceClassification

    t5 = T5ForSequenceClassification(tiny_t5(num_labels=1).config)
    inputs = batch() | {"labels": torch.zeros(4)}
    inputs["input_ids"][:, -1] = 1
    with pytest.raises(ValueError, match="smoothing needs labels that are tokens or classes"):
        get_hyperformer_model(t5, tiny_config())(**inputs, task="cola", smoothing=0.1)


def test_a_resized_head_is_prepared_again():
    model = tiny_model().train()
    model.resize_token_embeddings(70)
    assert model.why_logits() is None
    found, wanted = (loss_and_gradients(model, each)[0].loss for each in (False, True))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", ["lora", "wrapped", "prompts"])
def test_with_peft(method):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q"] if method == "lora" else ["q"])
    if method == "prompts":
        config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    t5 = tiny_t5(tied=False, dtype=torch.float32)
    model = tiny_model(t5=t5 if method == "lora" else peft.get_peft_model(t5, config)).train()
    if method == "prompts":
        assert "PEFT's prompts" in model.why_logits()
    elif method == "lora":
        peft.inject_adapter_in_model(config, model.t5)
        assert "not a plain linear" in model.why_logits()
    else:
        assert model.why_logits() is None
    found, wanted = (loss_and_gradients(model, each)[0].loss for each in (False, True))
    torch.testing.assert_close(found, wanted)


def test_a_quantised_head_keeps_its_logits():
    # a linear whose product is fused has another class, which quantize_dynamic does not know
    model = tiny_model(t5=tiny_t5(dtype=torch.float32), fuse=AUTO_PIECES - {"products"})
    torch.ao.quantization.quantize_dynamic(
        model.t5, {"lm_head": torch.ao.quantization.default_dynamic_qconfig}, inplace=True
    )
    assert "not a plain linear" in model.why_logits()
    with torch.no_grad():
        out = model(**some_labels(), task="cola", output_logits=False)
    assert out.logits.shape == (4, 5, 64)


def test_copies_pickles_and_threads_do_not_meet():
    model = tiny_model().train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, wanted = (loss_and_gradients(each, False)[1] for each in (twin, model))
        torch.testing.assert_close(found, wanted)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    inside, read = threading.Event(), []

    def other(module, args):
        inside.set()
        thread = threading.Thread(target=lambda: read.append(model.t5.lm_head(args[0]).shape))
        thread.start()
        thread.join()

    # another thread uses the same head while this one is to give it no rows
    model.t5.decoder.final_layer_norm.register_forward_pre_hook(other)
    assert loss_and_gradients(model, False)[0].logits is NOT_COMPUTED
    assert inside.is_set() and read == [(4, 5, 64)]


def test_an_error_within_leaves_nothing_behind():
    model = tiny_model().train()
    handle = model.t5.decoder.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**some_labels(), task="cola", output_logits=False)
    handle.remove()
    assert model(**some_labels(), task="cola").logits.shape == (4, 5, 64)
    t5 = model.unload()
    assert not t5.lm_head._forward_pre_hooks and t5(**some_labels()).logits.shape == (4, 5, 64)


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(t5=tiny_t5(dropout=0.1)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        gradients.append(loss_and_gradients(model, False)[1])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# The Trainer


def trained_by(folder, fields, **changes):
    trainer = small_trainer(folder, dropout=0.1, max_steps=3, **fields)
    for name, value in changes.items():
        setattr(trainer.model, name, value)
    trainer.train()
    return trainer


FIELDS = [
    {},
    {"label_smoothing_factor": 0.1, "mixed_batches": True},
    {"loss_reduction": "sum", "learning_rate": 1e-3},
    {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
    {"bf16": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_our_trainer_needs_no_logits_and_trains_the_same(tmp_path, fields, monkeypatch):
    monkeypatch.setattr(HyperFormerTrainer, "_loss", _expecting_no_logits)
    without = trained_by(tmp_path / "without", fields)
    monkeypatch.undo()
    with_logits = trained_by(tmp_path / "with", fields, why_logits=lambda: "because")
    tolerance = 2e-2 if "bf16" in fields else 1e-4
    assert losses(without) == pytest.approx(losses(with_logits), rel=tolerance)
    for name, value in trained(without.model).items():
        torch.testing.assert_close(value, trained(with_logits.model)[name], rtol=10 * tolerance, atol=tolerance)


_loss = HyperFormerTrainer._loss


def _expecting_no_logits(self, outputs, labels, num_items_in_batch=None):
    assert outputs["logits"] is NOT_COMPUTED
    return _loss(self, outputs, labels, num_items_in_batch)


def test_whoever_reads_the_logits_in_training_gets_them(tmp_path):
    seen = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs["logits"].shape[-1])
        return outputs["logits"].square().mean()

    trainer = small_trainer(tmp_path, max_steps=1)
    trainer.compute_loss_func = own_loss
    trainer.train()
    assert seen == [384]

    class Reading(HyperFormerTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            seen.append(outputs.logits.shape[-1])
            return (loss, outputs) if return_outputs else loss

    trainer = small_trainer(tmp_path, max_steps=1)
    trainer.__class__ = Reading
    trainer.train()
    trainer = small_trainer(tmp_path, max_steps=1)
    trainer.model.register_forward_hook(lambda model, args, out: seen.append(out.logits.shape[-1]))
    trainer.train()
    assert seen == [384] * 3


def test_an_evaluation_has_its_logits(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.args.predict_with_generate = False
    found = trainer.predict(trainer.eval_dataset["cola"].remove_columns("label"))
    assert found.predictions[0].shape[-1] == 384


@pytest.mark.parametrize("tasks", [TASKS])
def test_other_calls_are_not_changed(tasks):
    model = tiny_model()
    out = model(**{name: value for name, value in some_labels().items() if name != "labels"},
                decoder_input_ids=torch.zeros(4, 2, dtype=torch.long), task="cola", output_logits=False)  # fmt: skip
    assert out.loss is None and out.logits.shape == (4, 2, 64)
    assert model.generate(batch()["input_ids"], task="cola", max_new_tokens=3).shape == (4, 4)
    with torch.no_grad():
        assert model(**some_labels(), task="cola", output_logits=False).logits is NOT_COMPUTED
