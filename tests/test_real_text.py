"""The comparison on real text: what each run is given, what is not trained twice, and the summary over seeds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import data_folder, saved_t5

from hyperformer_fast.training.arguments import RunArguments

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("real_text")


def options_of(tool, tmp_path, command, *more):
    paths = ["--t5", str(tmp_path / "t5"), "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    return tool.options_of([command, *paths, "--output", str(tmp_path / "out"), "--steps", "10", *more])


def test_every_method_is_given_the_same_but_its_learning_rate(tool, tmp_path):
    (tmp_path / "data").mkdir()
    options = options_of(tool, tmp_path, "train", "--learning-rate", "adapters=0.25")
    configs = {method: tool.configuration(options, method, ["cola"], 1) for method in tool.METHODS}
    for method, config in configs.items():
        run = RunArguments.from_dict(config)
        assert (run.adapters.variant, run.training.seed, run.training.max_steps) == (method, 1, 10)
        own = {"variant": method, "learning_rate": config["learning_rate"]}
        assert config == {**configs["finetuning"], **own}
    assert configs["adapters"]["learning_rate"] == 0.25


def metrics(score):
    value = {"accuracy": score, "score": score}
    of_task = {"metrics": value, "majority": {"accuracy": 50.0, "score": 50.0}}
    return {
        "average_metrics": score,
        "average_tasks": score + 1,
        "majority_average_metrics": 50.0,
        "majority_average_tasks": 51.0,
        "trained_parameters": 1234,
        "percent_per_task": 0.5,
        "train_seconds": 3.0,
        "tasks": {"rte": of_task},
    }


def test_the_table_has_means_deviations_and_parameters(tool, tmp_path):
    found = {("adapters", 0): metrics(60.0), ("adapters", 1): metrics(64.0), ("finetuning", 0): metrics(70.0)}
    results = tool.compared(found, ["finetuning", "adapters"])
    assert results["methods"]["adapters"]["average_tasks"] == {"mean": 63.0, "deviation": pytest.approx(8**0.5)}
    assert results["methods"]["finetuning"]["tasks"]["rte"]["accuracy"] == {"mean": 70.0, "deviation": None}
    console = Console(width=140)
    with console.capture() as captured:
        console.print(tool.comparison_table(results))
    said = captured.get()
    for text in ("62.0 ± 2.8", "63.0 ± 2.8", "70.0", "50.0", "51.0", "1,234", "0.50 %", "majority class"):
        assert text in said
    results["settings"] = tool.settings(options_of(tool, tmp_path, "train"), ["rte"])
    path = tmp_path / "real-text-x.json"
    path.write_text(json.dumps({"machine": tool.machine(), "results": results}))
    plots = importlib.import_module("plots")
    assert plots.draw(path).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_a_process_of_its_own_and_is_not_trained_twice(tool, tmp_path, monkeypatch):
    saved_t5(tmp_path / "t5")
    data_folder(tmp_path / "data", ("cola",))
    options = options_of(tool, tmp_path, "train", "--reduction", "4", "--embedding", "4")
    config = {**tool.configuration(options, "adapters", ["cola"], 0), "max_steps": 1}
    first = tool.train(tmp_path / "work" / "one", config)
    assert first["variant"] == "adapters" and first["steps"] == 1
    started = []
    monkeypatch.setattr(tool, "command", lambda *arguments, log: started.append(arguments))
    assert tool.train(tmp_path / "work" / "one", config) == first and not started
    with pytest.raises(FileNotFoundError):  # the stand-in trains nothing
        tool.train(tmp_path / "work" / "one", {**config, "max_steps": 2})
    assert started[0][0] == "train"


def test_a_run_that_fails_shows_the_end_of_its_log(tool, tmp_path):
    with pytest.raises(RuntimeError, match=r"hyperformer-fast nonsense failed[\s\S]*invalid choice: 'nonsense'"):
        tool.command("nonsense", log=tmp_path / "log")
