"""Examples are tokenised once, whoever asks, and collated into batches that say their task."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch
from support.runs import SMALL, data_folder, rows, small_t5
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.data import Collator, HyperFormerDataCollator, TaskData, encode, load_tasks
from hyperformer_fast.data.cache import Cache
from hyperformer_fast.data.encode import tokenizer_print
from hyperformer_fast.data.tasks import DataError, TaskSpec


def task(tmp_path, n=4, name="cola", **cache):
    return TaskData.from_dataset(name, cache=Cache(str(tmp_path), **cache), train=rows(name, n))


def test_a_split_becomes_tokens(tmp_path):
    tokenizer, data = ByT5Tokenizer(), task(tmp_path)
    encoded = encode(data, "train", tokenizer, 64, index=3)
    assert set(encoded.column_names) == {"input_ids", "labels", "task_index", "task"}
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in encoded["input_ids"]] == [
        f"sentence: s{i:03d}" for i in range(4)
    ]
    assert encoded["labels"][1] == tokenizer("1").input_ids and encoded[0]["task"] == "cola"
    assert list(encoded["task_index"]) == [3] * 4
    assert len(encode(data, "train", tokenizer, 64, limit=2)) == 2
    assert {len(row) for row in encode(data, "train", tokenizer, 6)["input_ids"]} == {6}
    with pytest.raises(DataError, match="task 'cola' has no split 'test'; it has train"):
        encode(data, "test", tokenizer, 64)


class Counting(ByT5Tokenizer):
    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def test_tokens_are_kept_for_the_next_run(tmp_path):
    tokenizer = Counting()
    first = encode(task(tmp_path), "train", tokenizer, 64)
    assert Counting.calls > 0 and first.cache_files
    Counting.calls = 0
    again = encode(task(tmp_path), "train", Counting(), 64)
    assert Counting.calls == 0 and again.to_dict() == first.to_dict()
    for changed in (
        lambda: encode(task(tmp_path, n=5), "train", tokenizer, 64),
        lambda: encode(task(tmp_path), "train", tokenizer, 63),
        lambda: encode(task(tmp_path), "train", tokenizer, 64, index=1),
        lambda: encode(task(tmp_path), "train", Counting(extra_ids=10, additional_special_tokens=None), 64),
    ):
        Counting.calls = 0
        changed()
        assert Counting.calls > 0


def test_overwrite_cache_makes_them_anew_once(tmp_path, monkeypatch):
    encode(task(tmp_path), "train", Counting(), 64)
    Counting.calls = 0
    encode(task(tmp_path, overwrite=True), "train", Counting(), 64)
    assert Counting.calls == 0, "they were made by this run"
    monkeypatch.setattr("hyperformer_fast.data.cache._STARTED", 1e12)
    encode(task(tmp_path, overwrite=True), "train", Counting(), 64)
    assert Counting.calls > 0


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    data = load_tasks(data_folder(tmp_path / "data", ("cola",)), cache_dir=str(tmp_path / "file"))["cola"]
    assert len(encode(data, "train", ByT5Tokenizer(), 64)) == len(data.splits["train"]) == 24


SCRIPT = """
import json, sys
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from hyperformer_fast.data import encode, load_tasks

class Counting(ByT5Tokenizer):
    calls = 0
    def __call__(self, *args, **kwargs):
        Counting.calls += 1
        return super().__call__(*args, **kwargs)

data = load_tasks(sys.argv[1], cache_dir=sys.argv[2])["cola"]
found = encode(data, "train", Counting(), 64)
"""


def test_another_process_finds_what_this_one_made(tmp_path):
    folder, cache = data_folder(tmp_path / "data", ("cola",)), str(tmp_path / "cache")
    data = load_tasks(folder, cache_dir=cache)["cola"]
    tokens = encode(data, "train", Counting(), 64)
    code = f"{SCRIPT}\nprint(json.dumps([Counting.calls, data.fingerprint(), found[3]['input_ids']]))"
    told = subprocess.run([sys.executable, "-c", code, folder, cache], stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(told.stdout) == [0, data.fingerprint(), tokens[3]["input_ids"]]


def test_of_two_that_start_together_one_does_the_work(tmp_path):
    """Whichever takes the lock first tokenises, and the other reads what it wrote."""
    together, calls = threading.Barrier(2), []

    class Noting(Counting):
        def __call__(self, *args, **kwargs):
            calls.append(threading.get_ident())
            return ByT5Tokenizer.__call__(self, *args, **kwargs)

    def work(_):
        data = task(tmp_path, n=50)
        together.wait()
        return encode(data, "train", Noting(), 64).to_dict()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(work, range(2))
    assert one == other and len(set(calls)) == 1


def test_a_tokenizer_keeps_its_hash_when_it_is_used():
    def fast():
        backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, "<pad>"))
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")

    for make in (fast, ByT5Tokenizer):
        tokenizer = make()
        before = tokenizer_print(make())
        tokenizer(["a b a"] * 2, truncation=True, max_length=2, padding="max_length")
        assert tokenizer_print(tokenizer) == before
        tokenizer.add_tokens(["<new>"])
        assert tokenizer_print(tokenizer) != before


def test_targets_that_are_truncated_are_said(tmp_path):
    texts = datasets.Dataset.from_dict({"source": ["a", "b"], "target": ["short", "a long text"], "label": ["", ""]})

    class Text:
        name, target, labels, max_target_length = "mine", "text", None, 8

    data = TaskData(Text(), {"train": texts}, Cache(str(tmp_path)))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="mine train: 1 of 2 targets have more than max_target_length=8 tokens"):
            encoded = encode(data, "train", ByT5Tokenizer(), 64)
    assert encoded["labels"][1] == ByT5Tokenizer()("a long ").input_ids
    with pytest.raises(DataError, match="'cola': its labels need up to 2 tokens, but max_target_length is 1; raise it"):
        encode(task(tmp_path), "train", ByT5Tokenizer(), 64, 1)


def encoded_rows(tmp_path, name="cola", index=0):
    return list(encode(task(tmp_path, name=name), "train", ByT5Tokenizer(), 64, index=index))


def test_a_batch_is_padded_and_carries_its_task(tmp_path):
    found = encoded_rows(tmp_path)
    found[0]["input_ids"] = found[0]["input_ids"][2:]
    batch = HyperFormerDataCollator(ByT5Tokenizer())(found[:2])
    assert batch["task"] == "cola" and "task_index" not in batch
    assert batch["attention_mask"].sum(1).tolist() == [13, 15] and (batch["input_ids"][0, 13:] == 0).all()
    found[1]["labels"] = [5]
    batch = HyperFormerDataCollator(ByT5Tokenizer(), pad_to_multiple_of=8)(found[:2])
    assert batch["input_ids"].shape == (2, 16) and batch["labels"].tolist()[1][:2] == [5, -100]


def test_a_batch_of_several_tasks_carries_indices(tmp_path):
    found = [encoded_rows(tmp_path)[0], encoded_rows(tmp_path, "stsb", 4)[0]]
    batch = HyperFormerDataCollator(ByT5Tokenizer())(found)
    assert "task" not in batch and batch["task_index"].tolist() == [0, 4]
    assert batch["task_index"].dtype == torch.int64 and isinstance(batch["labels"], torch.Tensor)
    same = [encoded_rows(tmp_path)[0], encoded_rows(tmp_path, "stsb")[0]]
    with pytest.raises(ValueError, match=r"different tasks \(cola, stsb\) have the same task_index: give encode"):
        HyperFormerDataCollator(ByT5Tokenizer())(same)
    model = get_hyperformer_model(small_t5(), HyperFormerConfig(tasks=["cola", "stsb"], **SMALL))
    assert HyperFormerDataCollator(ByT5Tokenizer(), model)(same)["task_index"].tolist() == [0, 1]


def test_class_label_integers_need_their_names(tmp_path):
    found = [{**row, "task": index} for index, row in enumerate(encoded_rows(tmp_path)[:2])]
    for row in found:
        del row["task_index"]
    with pytest.raises(ValueError, match="must hold names, got 0; .*task_names=dataset.features"):
        HyperFormerDataCollator(ByT5Tokenizer())(found)
    names = ["stsb", "cola"]
    assert HyperFormerDataCollator(ByT5Tokenizer(), task_names=names)(found)["task"] == names
    assert HyperFormerDataCollator(ByT5Tokenizer(), task_names=names)(found[1:])["task"] == "cola"
    with pytest.raises(ValueError, match="task 1 is out of range: task_names has 1 names"):
        HyperFormerDataCollator(ByT5Tokenizer(), task_names=["cola"])(found)
    del found[0]["task"]
    with pytest.raises(ValueError, match="some examples of a batch have a task and others have none"):
        HyperFormerDataCollator(ByT5Tokenizer(), task_names=names)(found)


def test_a_model_gives_the_order_of_its_tasks_and_the_decoders_input(tmp_path):
    model = get_hyperformer_model(small_t5(), HyperFormerConfig(tasks=["cola", "stsb"], **SMALL))
    found = [{name: row[name] for name in ("input_ids", "labels")} for row in encoded_rows(tmp_path)[:2]]
    collate = HyperFormerDataCollator(ByT5Tokenizer(), model, task_names=["stsb", "cola"])
    batch = collate([{**row, "task": index} for index, row in enumerate(found)])
    assert batch["task_index"].tolist() == [1, 0], "the model's order, which is not that of the ClassLabel"
    assert batch["decoder_input_ids"].tolist() == model.prepare_decoder_input_ids_from_labels(batch["labels"]).tolist()
    assert torch.isfinite(model(**batch).loss)
    assert collate([{**row, "task_index": 1} for row in found])["task"] == "stsb"
    with pytest.raises(ValueError, match="task_index 2 is out of range: the model has cola, stsb"):
        collate([{**row, "task_index": index} for index, row in enumerate(found, 1)])
    with pytest.raises(ValueError, match="unknown task 'rte'; the model has cola, stsb"):
        collate([{**found[0], "task": "rte"}, {**found[1], "task": "cola"}])


def test_the_old_collator_still_works(tmp_path):
    with pytest.warns(DeprecationWarning, match="HyperFormerDataCollator"):
        collate = Collator(0)
    assert collate(encoded_rows(tmp_path)[:2])["task"] == "cola"


def test_the_order_of_the_columns_is_part_of_what_is_kept(tmp_path):
    folder = tmp_path / "data" / "pair"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"a": "x", "b": "y", "label": 0}\n')
    for columns, source in ((["a", "b"], "a: x b: y"), (["b", "a"], "b: y a: x")):
        (folder / "task.json").write_text(json.dumps({"columns": columns, "labels": ["0", "1"]}))
        data = load_tasks(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))["pair"]
        assert data.splits["train"]["source"][:] == [source]


def test_a_class_that_the_tokenizer_cannot_write_is_refused(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared("models/t5_mini"))
    for labels, match in (
        (["<yes>", "no"], "label '<yes>' back as 'yes>'"),
        (["no", " yes"], "label ' yes' back as ' ?yes'"),
    ):
        spec = TaskSpec(name="mine", columns=["a"], labels=labels)
        data = TaskData.from_dataset(spec, train=[{"a": "x", "label": i} for i in (0, 1)])
        with pytest.raises(DataError, match=f"task 'mine': the tokenizer reads the {match}"):
            encode(data, "train", tokenizer, 8)
