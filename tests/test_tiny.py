"""The embedded T5 and its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import T5ForConditionalGeneration

import hyperformer_fast
from hyperformer_fast import tiny
from hyperformer_fast.data.builtin import BUILTIN_SPECS, load_builtin
from hyperformer_fast.data.registry import builtin_spec
from hyperformer_fast.tiny import load_tiny

ASSET = Path(hyperformer_fast.__file__).parent / "assets" / "tiny_t5"

#: Of "sentence: the film was not dull", the logits of the first decoder position for the texts "0" to "7".
LOGITS = (-4.5711, -5.3275, -3.6358, -4.3352, -5.0292, -4.5003, -4.4283, -3.913)


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_the_asset_is_small_and_holds_no_code():
    files = {path.name: path.stat().st_size for path in ASSET.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 8e6
    assert {tensor.dtype for tensor in load_file(ASSET / "model.safetensors").values()} == {torch.float16}


def test_it_loads_whole_in_float32(loaded):
    t5, _ = loaded
    _, info = T5ForConditionalGeneration.from_pretrained(ASSET, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not t5.training and {p.dtype for p in t5.parameters()} == {torch.float32}
    stored = load_file(ASSET / "model.safetensors")
    for name, tensor in t5.state_dict().items():
        base = name if name in stored else "shared.weight"
        assert torch.equal(tensor, stored[base].float()), name
    assert t5.shared.weight.data_ptr() == t5.lm_head.weight.data_ptr() == t5.encoder.embed_tokens.weight.data_ptr()
    assert t5.shared.weight.data_ptr() == t5.decoder.embed_tokens.weight.data_ptr()


def test_logits_are_those_it_was_shipped_with(loaded):
    """In every release of transformers: tied weights are scaled, biases shared by layers, as when it was trained."""
    t5, tokenizer = loaded
    batch = tokenizer(["sentence: the film was not dull"], return_tensors="pt")
    with torch.no_grad():
        logits = t5(**batch, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
    digits = tokenizer.convert_tokens_to_ids([f"\u0120{digit}" for digit in range(8)])
    torch.testing.assert_close(logits[digits], torch.tensor(LOGITS), rtol=1e-3, atol=2e-3)


#: For each task of classes the accuracy that a linear probe on the frozen encoder reaches at least; a third to two
#: thirds is the majority class.
READABLE = dict.fromkeys(("sentiment", "topic", "grammar", "entailment", "question_type", "paraphrase"), 0.95)


@pytest.mark.parametrize("task", READABLE)
def test_its_features_are_worth_adapting(loaded, task):
    t5, tokenizer = loaded
    spec = builtin_spec(task)

    def features(rows):
        batch = tokenizer([spec.source_text(row, "") for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = t5.encoder(**batch).last_hidden_state * batch.attention_mask.unsqueeze(-1)
        end = states[range(len(rows)), batch.attention_mask.sum(1) - 1]
        return torch.cat([states.mean(1), end], 1).numpy(), [row["label"] for row in rows]

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.05))
    probe.fit(*features(load_builtin(task, "train")[:800]))
    assert probe.score(*features(load_builtin(task, "validation"))) > READABLE[task]


@pytest.mark.parametrize("task", BUILTIN_SPECS)
def test_it_answers_no_task_before_it_is_adapted(loaded, task):
    """It knows what tasks ask, and does not say it: an objective of its pretraining that was a task would do that."""
    t5, tokenizer = loaded
    spec, rows = builtin_spec(task), load_builtin(task, "validation")[:100]
    batch = tokenizer([spec.source_text(row, "") for row in rows], padding=True, return_tensors="pt")
    written = tokenizer.batch_decode(t5.generate(**batch, max_new_tokens=12), skip_special_tokens=True)
    if task in ("grammar", "entailment"):  # of which an objective asks nearly the same, and answers in other words
        assert not {"kept", "changed", "none", "one", "two", "three"} & {
            word for text in written for word in text.split()
        }
    right = [text == spec.target_text(row["label"]) for text, row in zip(written, rows, strict=True)]
    assert sum(right) <= 5


def test_padding_and_company_change_nothing(loaded):
    t5, tokenizer = loaded
    texts = ["sentence: the dog sleeps", "sentence: the singer played the waltz in Rome on Monday"]
    start = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        together = t5(**tokenizer(texts, padding=True, return_tensors="pt"), decoder_input_ids=start).logits
        alone = t5(**tokenizer(texts[:1], return_tensors="pt"), decoder_input_ids=start[:1]).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_has_t5s_special_pieces(loaded):
    t5, tokenizer = loaded
    assert len(tokenizer) == t5.config.vocab_size == 2048
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    assert sentinels == list(range(sentinels[0], sentinels[0] + 100)) and set(sentinels) <= {*tokenizer.all_special_ids}
    ids = tokenizer("the <extra_id_0> sleeps").input_ids
    assert ids == tokenizer("the").input_ids[:-1] + sentinels[:1] + tokenizer("sleeps").input_ids
    padded = tokenizer(["the dog", "a"], padding=True)
    assert padded.attention_mask == [[1, 1, 1], [1, 1, 0]] and padded.input_ids[1][1:] == [1, 0]


def test_digits_and_most_words_of_the_tasks_are_one_piece_each(loaded):
    _, tokenizer = loaded
    assert [tokenizer.decode([i]) for i in tokenizer("2.48").input_ids[:-1]] == ["2", ".", "4", "8"]
    words = {word for task in BUILTIN_SPECS for row in load_builtin(task, "test") for word in _words(row)}
    longer = [word for word in words if len(tokenizer(word).input_ids) != 2]
    assert len(words) > 250 and len(longer) < 0.06 * len(words)


def _words(row):
    return [word for name, text in row.items() if name != "label" for word in text.split()]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_comes_back(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.unk_token_id not in ids
        # A word is the same at the start of a text as within it: the space before it is implied.
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")


def _tokenizer(kept=[]):  # noqa: B006 - a tokenizer takes longer to make than an example to run
    if not kept:
        kept.append(load_tiny()[1])
    return kept[0]


@pytest.mark.parametrize("absent", sorted(FILES - {"generation_config.json"}))
def test_a_missing_asset_is_named(monkeypatch, tmp_path, absent):
    folder = tmp_path / "assets" / "tiny_t5"
    shutil.copytree(ASSET, folder)
    monkeypatch.setattr(tiny, "files", lambda package: tmp_path)
    load_tiny()
    (folder / absent).unlink()
    with pytest.raises(FileNotFoundError, match=f"tiny_t5.{absent}: reinstall.*pretrain_tiny"):
        load_tiny()
