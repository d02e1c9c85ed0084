"""The studies: what each run is given, what is not run twice, which rows are looked at, and the summaries."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import data_folder

from hyperformer_fast.data import load_tasks
from hyperformer_fast.data.builtin import BUILTIN_SPECS, load_builtin
from hyperformer_fast.training import HyperFormerTrainer
from hyperformer_fast.training.arguments import RunArguments

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MAJORITY = {"accuracy": 50.0, "score": 50.0}


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def study(module):
    return module("study")


@pytest.fixture
def options_of(study, tmp_path):
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    return lambda *words: study.options_of([words[0], *folders, *words[1:]])


@pytest.fixture
def text(tmp_path):
    """The options of real text."""
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"weights")
    return ["--t5", str(tmp_path / "t5"), "--data", data_folder(tmp_path / "data"), "--tasks", "cola", "stsb"]


def metrics(config, split, score):
    tasks = {
        task: {
            "split": split,
            "rows": 250,
            "metrics": {"accuracy": score, "score": score},
            "majority": MAJORITY,
            "loss": score / 100,
        }
        for task in config["tasks"]
    }
    averages = {"average_metrics": score, "average_tasks": score + 1}
    averages |= {"majority_average_metrics": 50.0, "majority_average_tasks": 51.0}
    more = {"train_seconds": 3.0, "trained_parameters": 1234, "percent_per_task": 0.5}
    return {"variant": config["variant"], **averages, **more, "tasks": tasks}


@pytest.fixture
def commands(module, study, monkeypatch):
    """Stands in for `hyperformer-fast`: what it is asked for, and what it writes. A rate of 1 diverges."""
    runs, asked = module("runs"), []

    def command(*arguments, log):
        asked.append(arguments)
        if arguments[0] == "train":
            config = json.loads(Path(arguments[1]).read_text())
            if config["learning_rate"] == 1:
                raise runs.Diverged("the loss is nan")
            folder = Path(config["output_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            score = 60.0 + 1000 * config["learning_rate"] + config["seed"]
            (folder / "metrics.json").write_text(json.dumps(metrics(config, "test", score)))
            figures = {"diagnostics/encoder/weight_variation": 0.5, "diagnostics/other": 1.0, "loss": 1.0}
            (folder / "history.json").write_text(json.dumps([{"step": 5, **figures}, {"step": 10, **figures}]))
        elif arguments[0] == "evaluate":
            assert arguments[2:] == ("--split", "validation")
            config = json.loads(arguments[1].with_name(arguments[1].name + ".json").read_text())
            score = 90.0 - 1000 * config["learning_rate"] + config["seed"]
            of_a_training = {"train_seconds", "trained_parameters", "percent_per_task"}
            found = {k: v for k, v in metrics(config, "validation", score).items() if k not in of_a_training}
            (arguments[1] / "evaluation.json").write_text(json.dumps(found))
        else:
            folder = Path(arguments[arguments.index("--output_dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            cell = {"mean": 60.0, "deviation": 1.0, "majority": 50.0, "split": "test", "rows": 250}
            method = {"run": str(arguments[1]), "variant": "x", "cells": {"4": cell, "16": cell}}
            task = arguments[arguments.index("--task") + 1]
            results = {"task": task, "train": "all", "training": {"max_steps": 200}, "samples": [4, 16], "seeds": 5}
            (folder / "fewshot.json").write_text(json.dumps({**results, "methods": {"x": method}}))

    for each in (runs, study):
        monkeypatch.setattr(each, "command", command)
    return asked


def results_of(options):
    (path,) = options.output.glob("*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())["results"], path.with_suffix(".md").read_text()


@pytest.mark.parametrize("on_text", [False, True], ids=["builtin", "text"])
def test_methods_differ_in_nothing_but_what_they_are(study, options_of, text, on_text):
    options = options_of("compare", *(text if on_text else ()))
    labels = [line.label for line in options.lines]
    assert labels[0] == "finetuning" and len(labels) == 11 and "hyperformer++ (authors)" in labels
    configs = {line: study.run_of(options, line, 1e-3, 1)[1] for line in options.lines}
    assert len({study.run_of(options, line, 1e-3, 1)[0] for line in configs}) == len(configs)
    for line, config in configs.items():
        RunArguments.from_dict(config)
        assert config.get("split_validation_test") == (True if on_text else None)
        if line.method == "single_task":
            assert config["max_steps"] == options.steps // len(options.tasks)
        else:
            assert {n: v for n, v in config.items() if n not in ("variant", "recipe")} == {
                n: v for n, v in configs[options.lines[0]].items() if n != "variant"
            }


def test_a_run_is_all_that_it_depends_on(module, study, options_of, monkeypatch):
    configurations = module("configurations")
    options = options_of("compare", "--methods", "hyperformer++:default")
    (line,) = options.lines

    def folder(rate=1e-3, seed=0, **changes):
        changed = SimpleNamespace(**{**vars(options), **changes})
        return study.run_of(changed, line, rate, seed)[0]

    monkeypatch.setattr(configurations, "recipe_fields", lambda name: {"init_weights": "a"})
    first = folder()
    assert folder() == first
    others = [folder(rate=2e-3), folder(seed=1), folder(contents="other rows"), folder(set={"temperature": 2})]
    monkeypatch.setattr(configurations, "recipe_fields", lambda name: {"init_weights": "b"})
    others.append(folder())
    assert len({first, *others}) == 6


def test_a_run_by_other_numbers_of_its_recipe_is_another(module, study, options_of, monkeypatch):
    configurations = module("configurations")

    def folders():
        options = options_of("compare", "--methods", "hyperformer++", "finetuning")
        return [study.run_of(options, line, 1e-3, 0)[0] for line in options.lines]

    default, authors, finetuning = folders()
    for number in ("UP_SHARE", "POST_GAMMA", "TASK_SHARE", "TASK_PART", "FAN_IN_EXPONENT"):
        with monkeypatch.context() as other:
            other.setattr(configurations, number, 0.7)
            found = folders()
        assert found[0] != default and found[1:] == [authors, finetuning]


def test_contents_are_those_of_the_t5_the_rows_the_code_and_the_processor(
    study, options_of, text, tmp_path, module, monkeypatch
):
    configurations = module("configurations")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "pcgrad.py").write_text("order = 1")
    monkeypatch.setattr(configurations, "PACKAGE", tmp_path / "package")
    before = options_of("compare", *text).contents
    assert options_of("compare", *text).contents == before
    (tmp_path / "package" / "pcgrad.py").write_text("order = 2")
    assert options_of("compare", *text).contents != before
    before = options_of("compare", *text).contents
    with monkeypatch.context() as other:
        other.setattr(configurations, "machine", lambda: {"cpu": "another"})
        assert options_of("compare", *text).contents != before
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"others")
    assert options_of("compare", *text).contents != before
    before = options_of("compare", *text).contents
    rows = tmp_path / "data" / "cola" / "train.jsonl"
    rows.write_text(rows.read_text().replace("001", "901"))
    assert options_of("compare", *text).contents != before


def test_rates_are_compared_on_validation_rows_and_nothing_is_run_twice(study, options_of, commands):
    options = options_of("rates", "--rates", "1e-3", "2e-3", "8e-3", "1", "--seeds", "2")
    study.rates(options)
    results, table = results_of(options)
    assert {task["split"] for task in results["evaluated"].values()} == {"validation"}
    default = results["methods"]["hyperformer++ (default)"]
    assert [each["mean"] for each in default["rates"]] == [89.5, 88.5, 82.5, 50.0]
    assert [each["diverged"] for each in default["rates"]] == [0, 0, 0, 2]
    assert default["within"] == {"points": 3.0, "best": 1e-3, "low": 1e-3, "high": 2e-3, "factor": 2.0}
    for words in ("validation rows", "2 seeds", "steps of", "89.5 ± 0.7", "50.0 ± 0.0 (2 diverged)", "a factor of 2"):
        assert words in table
    assert len(commands) == 2 * (4 + 3) * 2  # recipes, trainings and evaluations, seeds
    commands.clear()
    study.rates(options)
    assert not commands


def test_a_rate_has_the_loss_that_needs_no_text(module):
    def run(average, *losses):
        tasks = {
            f"t{i}": {"split": "validation", "rows": 4, "metrics": {"score": average}, "majority": {"score": 50.0}}
            | ({} if loss is None else {"loss": loss})
            for i, loss in enumerate(losses)
        }
        return {"average_metrics": average, "majority_average_metrics": 50.0, "tasks": tasks}

    comparison = module("comparison")
    found = {
        ("a", 0.1, 0): run(60.0, 1.0, 2.0),
        ("a", 0.1, 1): run(70.0, 2.0, 3.0),
        ("b", 0.1, 0): run(55.0, None, 1.0),
    }
    found["b", 0.1, 1] = None
    results = comparison.swept(found, ["a", "b"])
    (a,), (b,) = (results["methods"][label]["rates"] for label in "ab")
    assert a["loss"] == {"mean": 2.0, "deviation": pytest.approx(0.5**0.5)} and a["tasks"] == {"t0": 65.0, "t1": 65.0}
    assert b["loss"] is None and b["tasks"] == {"t0": 52.5, "t1": 52.5}  # one diverged, and had no loss
    shown = comparison.markdown(comparison.sweep_table(results, "x"))
    assert "| learning rate | a | loss | b | loss |" in shown
    assert "| 0.1 | 65.0 ± 7.1 | 2.000 ± 0.707 | 52.5 ± 3.5 (1 diverged) |  |" in shown


@pytest.mark.parametrize("command", ["rates", "compare", "options", "many", "transfer"])
def test_each_study_is_a_command(study, monkeypatch, text, tmp_path, command):
    class Asked(Exception):
        pass

    def in_parallel(title, calls, *_):
        raise Asked(title, len(calls))

    monkeypatch.setattr(study, "in_parallel", in_parallel)
    place = text[:4] if command == "many" else []
    monkeypatch.setattr("sys.argv", ["study.py", command, "--quick", "--work", str(tmp_path / "work"), *place])
    with pytest.raises(Asked):
        study.main()


def test_options_have_one_color_and_no_legend_of_recipes(module, study, options_of, commands, tmp_path, monkeypatch):
    """Beside methods a point without a recipe's name in brackets has none; here all have one."""
    drawn, plots = [], module("study_plots")
    plain = plots._averages
    monkeypatch.setattr(
        plots, "_averages", lambda axis, *rest, **named: (plain(axis, *rest, **named), drawn.append(axis))
    )
    study.options(options_of("options", "--quick", "--options", "default", "zero_delta"))
    study.compare(options_of("compare", "--quick", "--methods", "finetuning", "hyperformer++:default"))
    of_options, of_methods = (axis.get_legend_handles_labels()[1] for axis in drawn)
    assert {"no recipe", "recipe default"} <= set(of_methods) and not {"no recipe", "recipe default"} & set(of_options)


def test_an_evaluation_without_losses_is_made_again(module, study, options_of, commands):
    options = options_of("rates", "--quick", "--methods", "hyperformer++:default")
    study.rates(options)
    kept, _ = options.work.glob("*.validation.json")
    found = json.loads(kept.read_text())
    for task in found["tasks"].values():
        del task["loss"]
    kept.write_text(json.dumps(found))
    del commands[:]
    study.rates(options)
    assert [words[0] for words in commands] == ["evaluate"] and "loss" in kept.read_text()


def test_options_change_one_thing_each_on_validation_rows(module, study, options_of, commands, tmp_path):
    words = ["--quick", "--options", "default", "zero_delta", "embedding_warmup_steps, a quarter"]
    study.options(options_of("options", *words))
    configs = [json.loads(Path(words[1]).read_text()) for words in commands if words[0] == "train"]
    keys = {"zero_delta", "embedding_warmup_steps"}
    assert [{k: v for k, v in config.items() if k in keys} for config in configs] == [
        {}, {"zero_delta": True}, {"embedding_warmup_steps": 1},
    ]  # fmt: skip
    same = [{k: v for k, v in config.items() if k not in {*keys, "output_dir"}} for config in configs]
    assert same[0] == same[1] == same[2] and same[0]["mixed_batches"] is True and same[0]["recipe"] == "default"
    (path,) = (tmp_path / "out").glob("options-builtin-*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results["methods"]) == words[2:] == list(results["settings"]["options"])
    assert results["settings"]["options"]["zero_delta"] == {"zero_delta": True}
    assert {task["split"] for task in results["evaluated"].values()} == {"validation"}
    assert results["methods"]["default"]["loss"] == {"mean": pytest.approx(0.87), "deviation": None}
    assert "| average of tasks | loss |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size


def test_every_option_is_an_argument_of_a_run(module, tmp_path):
    configurations = module("configurations")
    for name in configurations.OPTIONS:
        fields = configurations.option_fields(name, 100)
        RunArguments.from_dict({"output_dir": str(tmp_path), "max_steps": 100, "mixed_batches": True, **fields})
        assert list(fields) == list(configurations.OPTIONS[name])


def test_another_argument_of_all_runs_stands_in_the_caption_and_can_name_the_results(study, options_of, commands):
    words = ["--set", "max_task_grad_norm=0.1", "mixed_batches=true", "--name", "clipped"]
    options = options_of("compare", "--seeds", "1", "--methods", "hyperformer++:default", *words)
    study.compare(options)
    results, table = results_of(options)
    assert results["settings"]["set"] == {"max_task_grad_norm": 0.1} and ", max_task_grad_norm 0.1" in table
    assert {path.name.startswith("compare-builtin-clipped-") for path in options.output.iterdir()} == {True}


@pytest.mark.parametrize("name", ["builtin", "t5_mini"])
def test_the_rates_that_are_swept_are_those_of_the_docs(options_of, name):
    (path,) = (BENCHMARKS / "results").glob(f"rates-{name}-avx*.json")
    methods = json.loads(path.read_text())["results"]["methods"]
    swept = tuple(options_of("rates").rates)
    assert {tuple(each["rate"] for each in method["rates"]) for method in methods.values()} == {swept}


def test_a_comparison_takes_the_rates_that_validation_chose(study, options_of, commands, tmp_path):
    options = options_of("rates", "--rates", "1e-3", "2e-3", "--seeds", "1", "--methods", "adapters", "finetuning")
    study.rates(options)
    (path,) = options.output.glob("*.json")
    chosen = tmp_path / "rates.json"
    path.rename(chosen)
    commands.clear()
    words = ["--chosen", str(chosen), "--seeds", "1", "--learning-rate", "hyperformer=0.5", "hyperformer:authors=0.25"]
    methods = ["--methods", "finetuning", "single_task", "adapters", "hyperformer"]
    options = options_of("compare", *words, *methods)
    found = study.rates_of(options)
    assert found == {
        **dict.fromkeys([line.label for line in options.lines], 1e-3),
        "hyperformer (default)": 0.5,
        "hyperformer (authors)": 0.25,
    }
    study.compare(options)
    assert len(commands) == 4  # the sweep has trained the others
    results, table = results_of(options)
    assert {task["split"] for task in results["evaluated"].values()} == {"test"}
    assert results["settings"]["learning_rates"] == found
    assert "adapters, a run each (authors)" in table and "test rows, percent, 1 seed" in table
    with pytest.raises(SystemExit, match=r"has no rate of hyperformer\+\+ \(default\), hyperformer\+\+ \(authors\)"):
        study.rates_of(options_of("compare", "--chosen", str(chosen), "--methods", "hyperformer++"))
    with pytest.raises(SystemExit, match="absent.json cannot be read: No such file"):
        study.rates_of(options_of("compare", "--chosen", str(tmp_path / "absent.json")))
    for text in ("{", "[]", json.dumps({"results": {"methods": {"a": {"average_metrics": 1}}}})):
        chosen.write_text(text)
        with pytest.raises(SystemExit, match="rates.json is not a result of `rates`"):
            study.rates_of(options_of("compare", "--chosen", str(chosen)))


@pytest.mark.parametrize("on_text", [False, True], ids=["builtin", "text"])
def test_what_a_sweep_lacks_takes_its_default_rate(study, options_of, commands, text, tmp_path, capsys, on_text):
    """The commands of docs/choosing.md: the sweep has HyperFormer++ alone, and the comparison all methods."""
    place = text if on_text else []
    options = options_of("rates", *place, "--rates", "4e-3", "7e-3", "--seeds", "1")
    study.rates(options)
    (path,) = options.output.glob("*.json")
    chosen = path.rename(tmp_path / "rates.json")
    default = study.rates_of(options_of("compare", *place))
    capsys.readouterr()
    found = study.rates_of(options_of("compare", *place, "--chosen", str(chosen)))
    swept = {"hyperformer++ (default)": 4e-3, "hyperformer++ (authors)": 4e-3}
    assert found == {**default, **swept}
    (said,) = capsys.readouterr().out.splitlines()
    for label, rate in default.items():
        assert (f"{label}: {rate:g}" in said) == (label not in swept)
    study.rates_of(options_of("compare", *place, "--chosen", str(chosen), "--methods", "hyperformer++"))
    assert not capsys.readouterr().out


def test_a_run_that_diverged_counts_as_the_majority_class(module):
    comparison = module("comparison")
    config = {"tasks": ["cola", "rte"], "variant": "adapters"}
    found = {("a", 0): metrics(config, "test", 70.0), ("a", 1): None, ("b", 0): None, ("b", 1): None}
    results = comparison.compared(found, ["a", "b"])
    assert results["methods"]["a"]["average_metrics"]["mean"] == 60.0
    assert results["methods"]["a"]["average_metrics"]["scores"] == [70.0, 50.0]
    assert results["methods"]["a"]["average_tasks"]["scores"] == [71.0, 51.0]
    assert results["methods"]["a"]["tasks"]["rte"]["score"]["mean"] == 60.0
    assert [results["methods"][label]["above_majority"] for label in "ab"] == [0, 0]  # 60 +- 14 is not above 50
    once = comparison.compared({("a", 0): found["a", 0]}, ["a"])
    assert once["methods"]["a"]["above_majority"] == 2
    table = comparison.markdown(comparison.methods_table(results, "a title"))
    assert "| b (2 diverged: as majority) | 50.0 ± 0.0 |" in table and table.endswith("\na title\n")
    with pytest.raises(SystemExit, match="all runs diverged"):
        comparison.compared({("b", 0): None}, ["b"])


@pytest.mark.parametrize(
    ("averages", "low", "high"),
    [
        ({1e-4: 50, 1e-3: 60, 1e-2: 58}, 1e-3, 1e-2),
        ({1e-4: 60, 2e-4: 50, 1e-3: 61, 1e-2: 20}, 1e-3, 1e-3),  # not over a gap
        ({1e-4: 57, 1e-3: 60, 1e-2: 57}, 1e-4, 1e-2),
    ],
)
def test_the_range_of_good_rates_has_no_gap(module, averages, low, high):
    found = module("comparison").within(averages)
    assert (found["low"], found["high"], found["factor"]) == (low, high, high / low)


def test_the_built_in_tasks_and_a_folders_are_read_as_one(study, options_of, text, tmp_path):
    options = options_of("many", *text[:4])
    assert set(options.tasks) == {"cola", "stsb", *BUILTIN_SPECS}
    data = load_tasks(options.data, options.tasks)
    for task in BUILTIN_SPECS:
        assert len(data[task].splits["test"]) == len(load_builtin(task, "test"))
    assert list(data["similarity"].spec.metrics) == list(load_tasks(None, ["similarity"])["similarity"].spec.metrics)
    before = options.data
    assert options_of("many", *text[:4]).data == before
    (tmp_path / "data" / "cola").rename(tmp_path / "data" / "topic")
    with pytest.raises(SystemExit, match="names of built-in ones .topic."):
        options_of("many", *text[:4])


def test_many_tasks_have_their_diagnostics_beside_them(study, options_of, commands, text):
    options = options_of("many", *text[:4], "--seeds", "1", "--quick")
    study.many(options)
    results, table = results_of(options)
    assert list(results["methods"]) == list(results["diagnostics"])
    assert results["diagnostics"]["hyperformer++ (default)"] == {"encoder/weight_variation": [[5, 0.5], [10, 0.5]]}
    assert str(options.work) not in json.dumps(results)
    assert "many on 1 built-in task and 1 task of real text, t5: test rows, percent, 1 seed, 4 steps of 4 rows" in table


def test_a_transfer_trains_without_the_new_task_and_once(study, options_of, commands):
    options = options_of("transfer", "--to", "topic", "--samples", "4", "16")
    study.transfer(options)
    configs = [json.loads(Path(words[1]).read_text()) for words in commands if words[0] == "train"]
    assert configs and all("topic" not in config["tasks"] for config in configs)
    results, table = results_of(options)
    assert list(results["methods"]) == [line.label for line in options.lines]
    assert str(options.work) not in json.dumps(results)
    of_draws = "test rows, percent, mean and deviation of 5 draws of the training rows"
    of_runs = f"one base run of {options.steps} steps, 200 steps of each transfer"
    assert f"Transfer to topic from 6 built-in tasks, embedded T5: {of_draws}, {of_runs}" in table
    commands.clear()
    study.transfer(options)
    assert not commands


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--t5", "x"], "--t5 and --data belong together"),
        (["many"], "real text needs --t5 and --data"),
        (["rates", "--methods", "single_task"], "must be one of finetuning, adapters"),
        (["compare", "--methods", "hyperformer:best"], "may end in a recipe"),
        (["compare", "--tasks", "topics"], "unknown task topics; there are sentiment"),
        (["compare", "--reduction", "4"], "--reduction is for real text"),
        (
            ["compare", "--learning-rate", "hyperformer++"],
            "must be METHOD=X or METHOD:RECIPE=X with a number X above 0",
        ),
        (["compare", "--learning-rate", "hyperformer++=fast"], "above 0, got 'hyperformer++=fast'"),
        (["compare", "--learning-rate", "hyperformr++=1e-3"], "must be one of finetuning, "),
    ],
)
def test_what_is_wrong_is_named(options_of, capsys, words, message):
    with pytest.raises(SystemExit):
        options_of(*words)
    assert message in capsys.readouterr().err


def test_after_an_error_no_further_run_begins(module):
    begun = []

    def call(number):
        begun.append(number)
        if number == 1:
            raise RuntimeError("no memory")

    calls = {number: (lambda number=number: call(number)) for number in range(50)}
    with pytest.raises(RuntimeError, match="no memory"):
        module("runs").in_parallel("test", calls, 1, lambda key, _: str(key))
    assert begun == [0, 1]


def test_a_divergence_is_told_by_what_the_trainer_says(module):
    trainer = SimpleNamespace(args=SimpleNamespace(learning_rate=1.0))
    assert module("runs").DIVERGED in HyperFormerTrainer._advice(trainer, "the loss is nan at step 1")
