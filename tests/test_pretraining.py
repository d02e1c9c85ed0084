"""The script that made the embedded T5: its text, its tokenizer, its objectives, and that a run goes on as it was."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from hyperformer_fast.data.builtin import BUILTIN_SPECS, load_builtin
from hyperformer_fast.data.builtin_prose import Prose
from hyperformer_fast.data.builtin_words import REVIEWED
from hyperformer_fast.data.registry import builtin_spec

TOOLS = Path(__file__).parents[1] / "tools"
MAKERS = ("spans", "pair_spans", "proceed", "count", "follows", "foretell", "intact", "recall")
GENERAL = ["It is a long way to the sea, he said.", "Nobody knew where the old key was."]


@pytest.fixture(scope="module", autouse=True)
def tools():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def objectives():
    objectives, tokenizer = (importlib.import_module(f"pretraining.{name}") for name in ("objectives", "tokenizer"))
    builtin = [row["sentence1"] for row in load_builtin("similarity", "train")[:200]]
    pieces = tokenizer.train_tokenizer(builtin + GENERAL, 700)
    return objectives.Objectives(GENERAL, builtin, Prose(), tokenizer.WordIds(pieces), seed=3)


def test_text_is_read_from_each_kind_of_file(tmp_path):
    text = importlib.import_module("pretraining.text")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text(
        "One sentence that is\nbroken here. Short.\n\nA second paragraph comes now"
    )
    rows = [{"s": "A row has its text here.", "label": 1}, {"s": "A row has its text here.", "label": "no text"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data.adj").write_text(
        "  1 This software and database is being provided\n"
        '00023280 00 s 01 true 0 000 | placed with care again; "his aim was quite true"- Me; short  \n'
    )
    (tmp_path / "c.py").write_text("this one is not of the text files")
    expected = {"One sentence that is broken here.", "A second paragraph comes now", "A row has its text here."}
    expected |= {"placed with care again", "his aim was quite true"}
    found = text.read_sentences([tmp_path])
    assert set(found) == expected and found == sorted(found)


def test_word_by_word_a_text_has_the_tokenizers_ids(objectives):
    ids = objectives.ids
    for sentence in [*GENERAL, "similarity 2.4 (né) sentence1: Anna"]:
        assert ids.text(sentence) == ids.tokenizer(sentence, add_special_tokens=False).input_ids


def test_a_batch_depends_on_the_step_alone(objectives):
    one = [(example.source, example.target) for example in objectives.batch(8, 5)]
    objectives.batch(8, 6)
    assert one == [(example.source, example.target) for example in objectives.batch(8, 5)]
    assert one != [(example.source, example.target) for example in objectives.batch(8, 10)]


@pytest.mark.parametrize("name", MAKERS)
def test_examples_say_what_is_true(objectives, name):
    objectives.draw.seed(name)
    tokenizer, sentinel, answers, changes = objectives.ids.tokenizer, objectives.ids.sentinel, set(), set()
    for _ in range(60):
        example = getattr(objectives, name)()
        target = tokenizer.decode(example.target)
        text = tokenizer.decode([i for i in _filled(example, sentinel)])
        prefix, _, rest = text.partition(": ")
        assert len(example.ends) == len(example.shared) == len(example.altered)
        for end, flag in zip(example.ends, example.shared, strict=True):
            assert example.source[end] < sentinel or flag == -100
        if name == "count":
            first, second = _pair(text)
            assert prefix == "count" and example.new == min(9, sum(word not in first for word in second))
            assert target == "none one two three four five six seven eight nine".split()[example.new]
            assert [flag == 1 for flag in example.shared] == [w in second for w in first] + [w in first for w in second]
        elif name == "intact":
            assert prefix == "intact" and target == ("changed" if example.changed else "kept")
            assert example.changed == (1 in example.altered) and "sentence: " in text
        elif name == "recall":
            way, _, rest = text.partition(" ")
            given, _, sentence = rest.partition(" sentence: ")
            words = sentence.split() if way != "last" else text.partition("sentence: ")[2].split()
            if way == "last":
                assert target == words[-1]
            else:
                assert target == words[words.index(given) + (1 if way == "after" else -1)]
        elif name == "proceed":
            assert _pair(text)[1] and 1 <= len(target.split()) <= 3
        elif name == "foretell":
            assert example.following == example.target and "sentence: " in text
            changes.add(example.changed)
        elif name == "follows":
            assert prefix == "follows" and target in ("yes", "no") and len(_pair(text)) == 2
        else:
            assert sentinel in example.target and "<extra_id" not in text
        answers.add(target)
    assert len(answers) > 1 and changes in (set(), {0, 1})


def test_no_word_that_is_a_tasks_label_is_an_answer(objectives):
    """What `intact`, `count` and `follows` ask is answered in other words, or the T5 would know tasks by heart."""
    module = importlib.import_module("pretraining.objectives")
    answers = {module.KEPT, module.CHANGED, module.YES, module.NO, *module.NUMBERS}
    labels = {
        builtin_spec(task).target_text(row["label"]) for task in BUILTIN_SPECS for row in load_builtin(task, "train")
    }
    assert not answers & labels


def test_an_altered_sentence_is_none_of_a_held_out_row(objectives, monkeypatch):
    """`grammar` alters sentences in the same way: without a check some of its test rows would be drawn."""
    words = "the old nurse waits in the park".split()
    objectives.draw.seed(0)
    monkeypatch.setattr(objectives, "words", {"wait"})
    drawn = [objectives._alter(words) for _ in range(300)]
    for changed, places in drawn:
        assert places == {i for i, (one, two) in enumerate(zip(words, changed, strict=True)) if one != two}
    made = {" ".join(changed) for changed, _ in drawn}
    assert "the old nurse wait in the park" in made and "the old nurse waits in the park" not in made
    monkeypatch.setattr(objectives.prose, "held", {"the old nurse wait in the park"})
    assert "the old nurse wait in the park" not in {" ".join(objectives._alter(words)[0]) for _ in range(300)}


def test_words_that_are_new_and_shown_are_counted(objectives):
    example = type(objectives.spans())(objectives.ids)
    objectives._pair(example, "Anna lost a hat".split(), "Boris sold a red hat".split(), {1: objectives.ids.sentinel})
    assert example.new == 2  # Boris, red


def _pair(text):
    for one, two in (("sentence1: ", " sentence2: "), ("context: ", " question: ")):
        if one in text and two in text:
            return [part.split() for part in text.partition(one)[2].split(two)]
    raise AssertionError(text)


def _filled(example, sentinel):
    """The source with what its sentinels stand for."""
    pieces, last = {}, None
    for i in example.target:
        if i >= sentinel:
            last = i
            pieces[last] = []
        elif last is not None:
            pieces[last].append(i)
    return [i for s in example.source for i in pieces.get(s, [s])]


def test_neighbours_that_are_hidden_share_a_sentinel(objectives):
    example = type(objectives.spans())(objectives.ids)
    words = "Anna bought a red car".split()
    example.lay(words, hidden={1: objectives.ids.sentinel, 2: objectives.ids.sentinel, 4: objectives.ids.sentinel + 1})
    shown = objectives.ids.tokenizer.decode(example.source, skip_special_tokens=False)
    assert shown.split() == "Anna<extra_id_0> red<extra_id_1>".split()
    assert len(example.ends) == 4


@pytest.fixture
def run(monkeypatch, tmp_path):
    script = importlib.import_module("pretrain_tiny")
    model = importlib.import_module("pretraining.model")
    monkeypatch.setattr(model, "CONFIG", {**model.CONFIG, "d_model": 16, "d_kv": 4, "d_ff": 8, "num_heads": 2})
    monkeypatch.setattr(script, "PASSAGES", 10)
    monkeypatch.setattr(
        script, "unlabelled_text", lambda: [row["sentence"] for row in load_builtin("grammar", "train")]
    )
    monkeypatch.setattr(importlib.import_module("pretraining.tokenizer"), "FRAMES", 10)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(GENERAL))

    def run(output, *further):
        arguments = f"--text-dir {tmp_path / 'text'} --output {output} --vocab-size 640 --batch-size 2 --steps 4"
        monkeypatch.setattr(sys, "argv", ["x", *arguments.split(), *further])
        script.main()

    run.model = model
    return run


def test_the_rate_rises_follows_the_lessons_and_falls_to_nothing():
    script, lessons = (importlib.import_module(name) for name in ("pretrain_tiny", "pretraining.objectives"))
    rates = [script.rate_at(step, 9000) for step in range(9000)]
    assert rates[0] == 1 / script.WARM_UP and rates[6000:] == sorted(rates[6000:], reverse=True)
    begin = script.WARM_UP
    for lesson in lessons.LESSONS:
        end = int(min(lesson.until, 6000))
        assert begin < end and set(rates[begin:end]) == {lesson.rate}
        begin = end
    assert rates[7500] == lesson.rate / 2 and rates[-1] == lesson.rate / 3000
    assert rates[:6000] == [script.rate_at(step, 12_000) for step in range(6000)]


def test_lessons_are_about_what_they_are_for(objectives):
    """The first two teach by prose of one kind each; what was asked for outside of a batch is of any kind again."""
    words = {"event": {"bought", "sold", "found", "lost", "painted", "cleaned"}, "review": set(REVIEWED)}
    for step in (0, 1, 800, 801):
        kind = "review" if step == 801 else "event"
        for example in objectives.batch(20, step):
            text = objectives.ids.tokenizer.decode([*_filled(example, objectives.ids.sentinel), *example.target])
            assert words[kind] & set(text.split()), (step, text)
    assert objectives.kind is None
    lesson = importlib.import_module("pretraining.objectives").lesson_at(5000)
    assert {*lesson.single.makers, *lesson.pairs.makers} == set(MAKERS)


def test_pretraining_saves_and_goes_on_as_if_it_had_not_stopped(run, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    run(tmp_path / "whole")
    assert "2 sentences of text, " in capsys.readouterr().out

    class Stop(Exception):
        pass

    keep = run.model.State.keep

    def stop(state):
        keep(state)
        if state.step == 2:
            raise Stop

    monkeypatch.setattr(run.model.State, "keep", stop)
    with pytest.raises(Stop):
        run(tmp_path / "parts", "--keep-minutes", "0")
    run(tmp_path / "parts")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    t5, info = T5ForConditionalGeneration.from_pretrained(tmp_path / "parts", output_loading_info=True)
    assert not info["missing_keys"]
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "parts")) == t5.config.vocab_size
    torch.set_num_threads(threads)


def test_the_smallest_vocabulary_is_bytes(run, tmp_path):
    run(tmp_path / "t5", "--vocab-size", "359")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "t5")
    text = "Zoë's 12 films were good"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokenizer) == 359 and len(ids) == len(f" {text}".encode())
    assert tokenizer.decode(ids) == text


def test_a_state_of_other_arguments_is_refused(run, tmp_path):
    run(tmp_path / "t5")
    with pytest.raises(SystemExit, match="t5.partial is of a run with .*'seed': 0.*, not .*'seed': 1"):
        run(tmp_path / "t5", "--seed", "1")
    with pytest.raises(SystemExit, match="t5.partial is at step 4 of 4, which is too late for 9"):
        run(tmp_path / "t5", "--steps", "9")


def test_heads_look_for_their_like_at_first():
    """In the upper layers the last head attends to the same vector 40 positions off rather than to itself."""
    model = importlib.import_module("pretraining.model")
    torch.manual_seed(1)
    t5 = model.Pretraining(2048).t5
    encoder, width = t5.encoder, t5.config.d_kv
    hidden = torch.randn(1, 80, t5.config.d_model)
    hidden[0, 60] = hidden[0, 20]
    bias = encoder.block[0].layer[0].SelfAttention.compute_bias(80, 80)[0, -1]
    for block in encoder.block[2:]:
        q, k = (getattr(block.layer[0].SelfAttention, name)(hidden)[0, :, -width:] for name in "qk")
        attention = (q @ k.T + bias).softmax(-1)
        assert attention[60, 20] > 0.9 and attention[20, 60] > 0.9
