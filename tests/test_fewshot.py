"""Few-shot transfer: which rows and weights a cell has, what is trained, how a study goes on, and what is refused."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.runs import data_folder, rows, saved_t5, small_run
from transformers import ByT5Tokenizer

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.cli import main
from hyperformer_fast.training import RunError, train_run
from hyperformer_fast.training import fewshot as module
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training.fewshot import fewshot_run

QUIET = Console(quiet=True)
VARIANTS = ("hyperformer++", "adapters", "finetuning")
STUDY = {"samples": [2, 5], "seeds": 2, "max_steps": 2, "console": QUIET}
ONE = {**STUDY, "samples": [5], "seeds": 1}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Without the curves of single runs, and with garbage collection of new objects only (the Trainer collects at its
    end): the two take most of the time of a run this small."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_curves", lambda *arguments: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data of four tasks, and a run of each method on two of them."""
    folder = tmp_path_factory.mktemp("fewshot")
    data = data_folder(folder / "data", ("cola", "stsb", "rte", "sst2"))
    t5 = saved_t5(folder / "t5")
    for variant in VARIANTS:
        more = {"variant": variant, "data_dir": data, "tasks": ["cola", "stsb"], "model_name_or_path": t5}
        train_run(small_run(folder / variant, max_steps=2, **more), console=QUIET)
    return folder


@pytest.fixture
def cells_trained(monkeypatch):
    """The arguments of each cell that is trained, and what its start has, by parameter."""
    cells = []

    def recording(arguments, console):
        start = HyperFormerModel.from_pretrained(arguments.model.init_from)
        cells.append((arguments, start, {name: p.detach().clone() for name, p in start.named_parameters()}))
        result = train_run(arguments, console=console)
        end = HyperFormerModel.from_pretrained(arguments.training.output_dir)
        cells[-1] += ({name for name, p in end.named_parameters() if not torch.equal(p, cells[-1][2][name])},)
        return result

    monkeypatch.setattr(module, "train_run", recording)
    return cells


def test_a_study_of_three_methods(trained, tmp_path, cells_trained):
    runs = [trained / variant for variant in VARIANTS]
    results = fewshot_run(runs, "rte", output_dir=tmp_path / "study", **{**STUDY, "samples": [5]})
    assert list(results["methods"]) == list(VARIANTS) and len(cells_trained) == 6
    for method in results["methods"].values():
        for cell in method["cells"].values():
            assert len(cell["scores"]) == 2 and cell["mean"] == pytest.approx(sum(cell["scores"]) / 2)
            spread = abs(cell["scores"][0] - cell["scores"][1]) / 2**0.5
            assert cell["deviation"] == pytest.approx(spread) and cell["split"] == "validation"
    assert json.loads((tmp_path / "study" / "fewshot.json").read_text()) == json.loads(json.dumps(results))
    table = (tmp_path / "study" / "fewshot.md").read_text().splitlines()
    assert table[2] == "| rows | majority class of the rows | HyperFormer++ | adapters | fine-tuning |"
    assert [line.split(" | ")[0] for line in table[4:]] == ["| 5"] and " ± " in table[4]
    assert (tmp_path / "study" / "fewshot.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "study" / "work").exists()
    for arguments, start, before, moved in cells_trained:
        of_run = HyperFormerModel.from_pretrained(trained / start.hyperformer_config.variant)
        assert start.hyperformer_config.tasks == ["cola", "stsb", "rte"] and arguments.data.tasks == ["rte"]
        for name, parameter in of_run.named_parameters():
            assert torch.equal(before[name], parameter), name
        assert arguments.training.seed == arguments.data.data_seed and arguments.training.learning_rate == 0.01
        assert moved and not [name for name in moved if name.endswith((".cola", ".stsb"))]


def test_the_rows_of_a_cell_are_the_first_of_the_authors_permutation(trained, tmp_path, monkeypatch):
    seen = []

    def peek(arguments, console):
        data = module.load_tasks(arguments.data, ["rte"])["rte"]
        seen.append((arguments.data.max_train_samples, arguments.data.data_seed, list(data.splits["train"]["source"])))
        return train_run(arguments, console=console)

    monkeypatch.setattr(module, "train_run", peek)
    fewshot_run(trained / "adapters", "rte", output_dir=tmp_path / "study", init_from="cola", **STUDY)
    every = [f"sentence1: {row['sentence1']} sentence2: {row['sentence2']}" for row in rows("rte", 24)]
    assert [(count, seed) for count, seed, _ in seen] == [(2, 42), (2, 43), (5, 42), (5, 43)]
    for count, seed, sources in seen:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
        assert sources == [every[i] for i in order[:count]]


@pytest.mark.parametrize("variant", ["hyperformer++", "adapters"])
def test_a_new_task_starts_from_the_one_with_the_lowest_loss(trained, tmp_path, cells_trained, variant):
    fewshot_run(trained / variant, "rte", output_dir=tmp_path, **ONE)
    ((arguments, start, *_),) = cells_trained
    cell = json.loads((tmp_path / "cells" / variant / "5-0.json").read_text())
    order = torch.randperm(24, generator=torch.Generator().manual_seed(42)).tolist()
    of_cell = [rows("rte", 24)[i] for i in order[:5]]
    tokens = ByT5Tokenizer()(
        [f"sentence1: {row['sentence1']} sentence2: {row['sentence2']}" for row in of_cell], return_tensors="pt"
    )
    labels = torch.tensor([[ord(str(row["label"])) + 3, 1] for row in of_cell])
    model = HyperFormerModel.from_pretrained(trained / variant).eval()
    losses = {task: model(**tokens, labels=labels, task=task).loss.item() for task in ("cola", "stsb")}
    assert cell["init_from"] == min(losses, key=losses.get) and cell["chosen_by"] == "lowest loss on the rows"
    name = cell["init_from"]
    assert torch.equal(start(**tokens, labels=labels, task="rte").loss, start(**tokens, labels=labels, task=name).loss)


def test_a_task_may_be_named_and_the_papers_choice_comes_first(trained, tmp_path, cells_trained, monkeypatch):
    fewshot_run(trained / "adapters", "rte", output_dir=tmp_path / "named", init_from="stsb", **ONE)
    monkeypatch.setitem(module.SOURCES, "sst2", "cola")
    fewshot_run(trained / "adapters", "sst2", output_dir=tmp_path / "auto", **ONE)
    for (_, start, *_), task, source in zip(cells_trained, ("rte", "sst2"), ("stsb", "cola")):
        table = start.hypernetworks["encoder"].adapters
        assert torch.equal(table[task], table[source]) and not torch.equal(table["cola"], table["stsb"])


def test_the_embedding_alone(trained, tmp_path, cells_trained):
    results = fewshot_run(trained / "hyperformer++", "rte", output_dir=tmp_path, train="embedding", **ONE)
    ((*_, moved),) = cells_trained
    assert moved == {"task_embeddings.task_to_embeddings.rte"}
    assert results["methods"]["hyperformer++"]["cells"]["5"]["trained_parameters"] == 3 * 4


def test_a_killed_study_goes_on_with_the_cells_that_it_lacks(trained, tmp_path, monkeypatch):
    run, settings = trained / "hyperformer++", {**STUDY, "samples": [2], "max_steps": 1}
    trained_cells = []

    def killed_in_the_second(arguments, console):
        result = train_run(arguments, console=console)
        trained_cells.append((arguments.data.max_train_samples, arguments.training.seed))
        if len(trained_cells) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, "train_run", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        fewshot_run(run, "rte", output_dir=tmp_path / "study", **settings)
    assert not (tmp_path / "study" / "fewshot.json").exists()
    resumed = fewshot_run(run, "rte", output_dir=tmp_path / "study", **settings)
    assert trained_cells == [(2, 42), (2, 43), (2, 43)]
    assert resumed == fewshot_run(run, "rte", output_dir=tmp_path / "whole", **settings)
    del trained_cells[:]
    more = fewshot_run(run, "rte", output_dir=tmp_path / "study", **{**settings, "samples": [2, 3], "seeds": 1})
    assert trained_cells == [(3, 42)] and more["methods"]["hyperformer++"]["cells"].keys() == {"2", "3"}


def test_another_study_in_the_folder_is_refused(trained, tmp_path):
    settings = {**ONE, "output_dir": tmp_path / "study"}
    run = tmp_path / "run"
    shutil.copytree(trained / "finetuning", run)
    fewshot_run(run, "rte", **settings)
    before = {path: path.read_bytes() for path in (tmp_path / "study").rglob("*") if path.is_file()}
    for changes, what in (
        ({"init_from": "cola"}, "init_from"),
        ({"max_steps": 3}, "training"),
        ({"task": "sst2"}, "task and data"),
    ):
        changed = {"task": "rte", **settings, **changes}
        with pytest.raises(RunError, match=rf"holds another study \({what} differ\): choose another --output_dir"):
            fewshot_run(run, changed.pop("task"), **changed)
    shutil.rmtree(run)
    train_run(
        small_run(
            run,
            variant="finetuning",
            seed=9,
            data_dir=str(trained / "data"),
            tasks=["cola", "stsb"],
            model_name_or_path=str(trained / "t5"),
        ),
        console=QUIET,
    )
    with pytest.raises(RunError, match="the weights of finetuning differ"):
        fewshot_run(run, "rte", **settings)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": [0]}, r"samples must be different numbers of rows, each at least 1, got \[0\]"),
        ({"samples": [4, 4]}, r"different numbers of rows, each at least 1, got \[4, 4\]"),
        ({"samples": [25]}, "samples has 25, but task 'rte' has 24 training rows only"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"train": "some"}, "train must be all or embedding, got 'some'"),
        ({"train": "embedding"}, "train=embedding needs task embeddings, which variant 'adapters'"),
        ({"init_from": "mnli"}, "init_from='mnli' is not a task of .*, which has cola, stsb"),
        ({"task": "cola"}, "was trained on 'cola' already"),
        ({"task": "nothing"}, "unknown task 'nothing'"),
        ({"data_dir": "/nowhere"}, "/nowhere"),
        ({"seed": 3}, "seed is decided by the study itself"),
        ({"reduction_factor": 2}, "reduction_factor is each run's own"),
        ({"learning_rat": 1.0}, "learning_rat.*learning_rate"),
        ({"run_dirs": []}, "at least one folder"),
        ({"run_dirs": ["/nowhere"]}, "/nowhere is not the folder of a run"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_written(trained, tmp_path, changes, message):
    given = {"run_dirs": [trained / "adapters"], "task": "rte", "output_dir": tmp_path / "study", **STUDY, **changes}
    with pytest.raises(ValueError, match=message):
        fewshot_run(given.pop("run_dirs"), given.pop("task"), **given)
    assert not (tmp_path / "study").exists()


def test_two_runs_of_one_method_are_told_apart_by_their_folders(trained, tmp_path):
    shutil.copytree(trained / "finetuning", tmp_path / "second")
    results = fewshot_run([trained / "finetuning", tmp_path / "second"], "rte", output_dir=tmp_path / "s", **ONE)
    assert list(results["methods"]) == ["finetuning (finetuning)", "finetuning (second)"]
    assert results["methods"]["finetuning (second)"]["cells"]["5"]["deviation"] is None
    table = (tmp_path / "s" / "fewshot.md").read_text()
    assert "| fine-tuning (finetuning) | fine-tuning (second) |" in table and "±" not in table


def test_several_processes_are_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one process: start it without torchrun"):
        fewshot_run(trained / "adapters", "rte", output_dir=tmp_path / "study", console=QUIET)
    assert not Path(tmp_path / "study").exists()


def test_the_command_takes_flags_of_train(trained, tmp_path, capsys):
    grid = ["--samples", "2", "--seeds", "1", "--max_steps", "1", "--learning_rate", "0.002"]
    runs = [str(trained / variant) for variant in ("hyperformer++", "adapters")]
    arguments = ["fewshot", *runs, "--task", "rte", *grid, "--output_dir", str(tmp_path / "study")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "hyperformer++, 2 rows, seed 0: " in said and "Transfer to rte: validation, 6 rows, percent, 1 seed" in said
    assert "trainable params" not in said
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert study["training"] == {"max_steps": 1, "learning_rate": 0.002}
    assert main([*arguments, "--max_steps", "2"]) == 1
    assert "holds another study (training differ)" in capsys.readouterr().err
    assert main(["fewshot", "--task", "rte", *grid[4:], *runs]) == 2
    assert "'1' is no folder of a run: give RUN_DIR before the flags of train" in capsys.readouterr().err


def test_cells_have_the_prefix_of_their_run_and_the_losses_are_of_the_cells_rows(trained, tmp_path, monkeypatch):
    sources = {}

    def peek(arguments, console):
        load = {**vars(arguments.data), "add_prefix": arguments.adds_prefix}
        found = module.load_tasks(type(arguments.data)(**load), ["rte"])["rte"]
        sources[Path(arguments.model.init_from).parent.name] = list(found.splits["train"]["source"])
        return train_run(arguments, console=console)

    monkeypatch.setattr(module, "train_run", peek)
    # A run that is added to a study reads other sources than the first, and that is no other study.
    for variant in ("finetuning", "adapters"):
        fewshot_run([trained / variant], "rte", output_dir=tmp_path, **{**ONE, "max_steps": 1})
    assert [source.removeprefix("rte ") for source in sources["finetuning"]] == sources["adapters"]
    assert all(source.startswith("rte ") for source in sources["finetuning"])
    study = module._Study(tmp_path, "rte", "auto", "all", None, None, None, {}, QUIET)
    (run,) = module._read_runs([trained / "adapters"], "rte", "auto", "all")
    run.arguments.data.split_validation_test = True
    monkeypatch.setattr("hyperformer_fast.data.sources.cut", lambda *_: 1 / 0)
    assert list(study._data(run, 5, 42).splits["train"]["source"]) == sources["adapters"]


def test_the_benchmark_of_embeddings_alone_runs(trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    arguments = [str(trained / "hyperformer++"), "--task", "rte", "--quick", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kshot.py", *arguments])
    importlib.import_module("kshot").main()
    (found,) = tmp_path.glob("kshot-rte-*.json")
    results = json.loads(found.read_text())["results"]
    (cell,) = results["cells"]["4"]
    assert cell["nearest"] in results["tasks"] == ["cola", "stsb"] and 0 <= cell["score"] <= 100


def test_arguments_of_the_training_are_those_of_each_cell(trained, tmp_path, cells_trained):
    """Epochs in place of the steps that are the default, evaluations while training, and no limit of the run's own."""
    asked = {"num_train_epochs": 2, "eval_steps": 1, "token": "hf_secret", "max_predict_samples": 4}
    study = {name: value for name, value in ONE.items() if name != "max_steps"}
    results = fewshot_run([trained / "adapters"], "rte", output_dir=tmp_path, **study, **asked)
    ((arguments, *_),) = cells_trained
    training = arguments.training
    assert training.max_steps == -1 and training.num_train_epochs == 2 and training.eval_strategy == "steps"
    assert "rte: validation, 4 rows, percent, 1 seed, 2 epochs" in (tmp_path / "fewshot.md").read_text()
    assert results["training"] == {name: value for name, value in asked.items() if name != "token"}
    assert not any("hf_secret" in path.read_text() for path in tmp_path.rglob("*.json"))
    with pytest.raises(RunError, match="tasks is decided by the study itself"):
        fewshot_run([trained / "adapters"], "rte", output_dir=tmp_path, **study, tasks=["cola"])


def test_a_study_removes_nothing_but_its_own(trained, tmp_path):
    mine = tmp_path / "work" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    fewshot_run([trained / "adapters"], "rte", output_dir=tmp_path, **ONE)
    assert mine.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["cells", "work"]


def test_rows_are_cut_as_a_training_that_stops_early_cuts_them(trained, tmp_path, monkeypatch):
    asked = {"eval_steps": 1, "early_stopping_patience": 1}
    study = module._Study(tmp_path, "rte", "auto", "all", None, None, None, asked, QUIET)
    (run,) = module._read_runs([trained / "adapters"], "rte", "auto", "all")
    cut = []
    monkeypatch.setattr(module, "load_tasks", lambda *_, selecting, **__: cut.append(selecting) or {"rte": None})
    study._data(run, 5, 42)
    assert cut == [True]
