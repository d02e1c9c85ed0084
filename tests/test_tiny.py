"""The embedded T5, its tokenizer, and the script that made it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from transformers import T5ForConditionalGeneration

import hyperformer_fast
from hyperformer_fast import tiny
from hyperformer_fast.data.builtin import load_builtin
from hyperformer_fast.tiny import load_tiny

ASSET = Path(hyperformer_fast.__file__).parent / "assets" / "tiny_t5"
SCRIPT = Path(hyperformer_fast.__file__).resolve().parents[1] / "tools" / "pretrain_tiny.py"

#: Of "sentence: the film was not dull", the logits of the first decoder position for the texts "0" to "7".
LOGITS = (9.9488, 9.5348, 5.3724, 3.5509, 1.8363, 0.9489, -1.6250, -2.2581)


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_asset_is_small_and_holds_no_code():
    files = {path.name: path.stat().st_size for path in ASSET.iterdir()}
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors"}
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
    digits = logits[ord("0") + 3 : ord("8") + 3]
    torch.testing.assert_close(digits, torch.tensor(LOGITS), rtol=1e-3, atol=2e-3)


def test_its_features_are_worth_adapting(loaded):
    """A linear probe on the frozen encoder tells the topics of unseen sentences apart (majority class: a third)."""
    t5, tokenizer = loaded

    def features(rows):
        batch = tokenizer([f"sentence: {row['sentence']}" for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = t5.encoder(**batch).last_hidden_state * batch.attention_mask.unsqueeze(-1)
        return (states.sum(1) / batch.attention_mask.sum(1, keepdim=True)).numpy(), [row["label"] for row in rows]

    probe = LogisticRegression(max_iter=2000, C=10).fit(*features(load_builtin("topic", "train")[:500]))
    assert probe.score(*features(load_builtin("topic", "test")[:100])) > 0.85


def test_padding_and_company_change_nothing(loaded):
    t5, tokenizer = loaded
    texts = ["sentence: the dog sleeps", "sentence: the singer played the waltz in Rome on Monday"]
    start = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        together = t5(**tokenizer(texts, padding=True, return_tensors="pt"), decoder_input_ids=start).logits
        alone = t5(**tokenizer(texts[:1], return_tensors="pt"), decoder_input_ids=start[:1]).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_bytes(loaded):
    _, tokenizer = loaded
    assert tokenizer("Tom, né 1.4").input_ids == [87, 114, 112, 47, 35, 113, 198, 172, 35, 52, 49, 55, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer(["ab", "c"], padding=True)
    assert ids.input_ids == [[100, 101, 1], [102, 1, 0]] and ids.attention_mask == [[1, 1, 1], [1, 1, 0]]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_comes_back(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert ids == [byte + 3 for byte in text.encode()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def _tokenizer(kept=[]):  # noqa: B006 - a tokenizer takes longer to make than an example to run
    if not kept:
        kept.append(load_tiny()[1])
    return kept[0]


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_a_missing_asset_is_named(monkeypatch, tmp_path, absent):
    folder = tmp_path / "assets" / "tiny_t5"
    shutil.copytree(ASSET, folder)
    monkeypatch.setattr(tiny, "files", lambda package: tmp_path)
    load_tiny()
    (folder / absent).unlink()
    with pytest.raises(FileNotFoundError, match=f"tiny_t5.{absent}: reinstall.*pretrain_tiny"):
        load_tiny()


@pytest.mark.parametrize("name", ["spans", "pair_spans", "count", "intact", "endings", "last"])
def test_examples_say_what_is_true(script, name):
    general = ["It is a long way to the sea, he said.", "Nobody knew where the old key was."]
    builtin = [row["sentence"] for row in load_builtin("topic", "train")[:200]]
    objectives = script.Objectives(general, builtin, seed=3)
    spelt = {index: word for word, index in objectives.vocabulary.items()}
    tokenizer, sentences, answers = _tokenizer(), set(general + builtin), set()
    for _ in range(60):
        example = getattr(objectives, name)()
        pieces = _pieces(script, example.target)
        text = tokenizer.decode([i for s in example.source for i in pieces.get(s, [s])])
        target = tokenizer.decode(example.target)
        prefix, _, rest = text.partition("sentence1: " if " sentence2: " in text else "sentence: ")
        first, *second = (part.split() for part in rest.split(" sentence2: "))
        assert len(example.ends) == len(example.words) == len(example.shared) == len(first + sum(second, []))
        for end, index in zip(example.ends, example.words, strict=True):
            if example.source[end] < script.FIRST_SENTINEL and index != script.IGNORED:
                word = script.encode(spelt[index])
                assert example.source[end + 1 - len(word) : end + 1] == word
        if second:
            flags = [word in second[0] for word in first], [word in first for word in second[0]]
            assert example.shared == [int(flag) for side in flags for flag in side]
        else:
            assert set(example.shared) == {script.IGNORED}
            assert (" ".join(first) in sentences) == (1 not in example.altered)
        if name == "count":
            assert prefix in ("", "count: ") and target == str(sum(word not in first for word in second[0]))
        elif name == "intact":
            assert prefix in ("", "intact: ") and target == str(int(1 not in example.altered))
        elif name == "endings":
            letter = prefix.removeprefix("ending in ")[0]
            assert prefix == f"ending in {letter}: " and target == str(sum(w.endswith(letter) for w in first))
        elif name == "last":
            assert prefix == "last: " and target == first[-1]
        else:
            assert prefix == "" and pieces
        answers.add(target)
    assert len(answers) > 1


def _pieces(script, target):
    """What each sentinel of a target stands for."""
    pieces, sentinel = {}, None
    for i in target:
        if i >= script.FIRST_SENTINEL:
            sentinel = i
            pieces[sentinel] = []
        elif sentinel is not None:
            pieces[sentinel].append(i)
    return pieces


def test_text_is_read_from_both_kinds_of_file(script, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text(
        "One sentence that is\nbroken here. Short.\n\nA second paragraph comes now"
    )
    rows = [{"s": "A row has its text here.", "label": 1}, {"s": "A row has its text here.", "label": "no text"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.py").write_text("this one is not of the text files")
    expected = {"One sentence that is broken here.", "A second paragraph comes now", "A row has its text here."}
    assert set(script.read_sentences([tmp_path])) == expected


def test_pretraining_saves_and_goes_on(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("Some words of a sentence.\n\nAnd there are more of them.")
    output, partial = tmp_path / "t5", tmp_path / "t5.partial"

    seconds = itertools.count(0, 0.6)  # a step of a hundredth of a minute, however busy the machine
    monkeypatch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))

    def run(minutes):
        arguments = f"x --text-dir {tmp_path} --output {output} --minutes {minutes} --batch-size 2"
        monkeypatch.setattr(sys, "argv", arguments.split())
        script.main()
        return json.loads((partial / "state.json").read_text())

    one = run(0.005)
    first = load_file(output / "model.safetensors")
    two = run(0.015)
    second = load_file(output / "model.safetensors")
    assert one["step"] == 1 and two["step"] == 2 and two["minutes"] > one["minutes"]
    assert "2 sentences of text, " in capsys.readouterr().out
    optimizer = torch.load(partial / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {2}
    # Two steps of a warm-up from zero: near each other, and far from another seed's start.
    change = max((second[name].float() - first[name].float()).abs().max().item() for name in first)
    assert 0 < change < 0.01
    t5, info = T5ForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and t5.num_parameters() < 4e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "t5", "t5.partial"]


def test_heads_look_for_their_like_at_first(script):
    """In the upper layers the last head attends to the same vector 40 positions off rather than to itself."""
    model = script.Pretraining(words=10).t5.encoder
    torch.manual_seed(1)
    hidden = torch.randn(1, 80, script.CONFIG.d_model)
    hidden[0, 60] = hidden[0, 20]
    bias = model.block[0].layer[0].SelfAttention.compute_bias(80, 80)[0, -1]
    for block in model.block[2:]:
        q, k = (getattr(block.layer[0].SelfAttention, name)(hidden)[0, :, -script.CONFIG.d_kv :] for name in "qk")
        attention = (q @ k.T + bias).softmax(-1)
        assert attention[60, 20] > 0.9 and attention[20, 60] > 0.9
