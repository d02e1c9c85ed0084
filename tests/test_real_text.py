"""The comparison on real text: what each run is given, what is not trained twice, and the summary over seeds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import data_folder, saved_t5

from hyperformer_fast import HyperFormerConfig
from hyperformer_fast.training.arguments import RunArguments

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("real_text")


@pytest.fixture
def runs(tool):
    return importlib.import_module("runs")


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


#: What lies beside each run. Finished runs are recognised by this text, to the last character.
SAID = """{
 "model_name_or_path": "T5",
 "data_dir": "DATA",
 "tasks": [
  "cola"
 ],
 "variant": "adapters",
 "reduction_factor": 16,
 "task_embedding_dim": 32,
 "projected_task_embedding_dim": 32,
 "max_steps": 10,
 "warmup_steps": 1,
 "learning_rate": 0.003,
 "per_device_train_batch_size": 16,
 "max_source_length": 64,
 "max_predict_samples": 400,
 "seed": 1,
 "eval_strategy": "no",
 "save_strategy": "no",
 "logging_steps": 20,
 "output_dir": "WORK/adapters-1"
}"""


@pytest.fixture
def finished(tool, runs, tmp_path, monkeypatch):
    """The options of a comparison whose two runs are finished; nothing can be trained."""
    options = options_of(tool, tmp_path, "train", "--methods", "adapters", "--tasks", "cola", "--seeds", "2")
    for seed in (0, 1):
        folder = options.work / f"adapters-{seed}"
        HyperFormerConfig(tasks=["cola"], variant="adapters", recipe="authors").save_pretrained(folder)
        said = SAID.replace('"seed": 1', f'"seed": {seed}').replace("adapters-1", f"adapters-{seed}")
        for name, path in (("T5", "t5"), ("DATA", "data"), ("WORK", "work")):
            said = said.replace(name, str(tmp_path / path))
        (options.work / f"adapters-{seed}.json").write_text(said)
        (folder / "metrics.json").write_text(json.dumps(metrics(60.0 + 4 * seed)))
    monkeypatch.delattr(runs, "command")
    return options


def test_finished_runs_are_recognised(tool, finished, tmp_path):
    tool.compare(finished)
    (written,) = finished.output.glob("real-text-*.json")
    found = json.loads(written.read_text())["results"]
    assert found["methods"]["adapters"]["average_metrics"]["mean"] == 62.0
    assert found["settings"]["recipes"] == {"adapters": "authors"}
    assert str(tmp_path) not in written.read_text()


def test_runs_of_one_method_have_one_recipe(tool, finished):
    HyperFormerConfig(tasks=["cola"], variant="adapters").save_pretrained(finished.work / "adapters-1")
    with pytest.raises(SystemExit, match=r"adapters-1 .seed 1. was trained by recipe 'default', other runs of adapt"):
        tool.compare(finished)


def metrics(score):
    value = {"accuracy": score, "score": score}
    of_task = {"split": "validation", "rows": 400, "metrics": value, "majority": {"accuracy": 50.0, "score": 50.0}}
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
    comparison = importlib.import_module("comparison")
    results = comparison.compared(found, ["finetuning", "adapters"])
    averages = {"mean": 63.0, "deviation": pytest.approx(8**0.5), "scores": [61.0, 65.0]}
    assert results["methods"]["adapters"]["average_tasks"] == averages
    assert results["methods"]["finetuning"]["tasks"]["rte"]["accuracy"] == {"mean": 70.0, "deviation": None}
    console = Console(width=140)
    with console.capture() as captured:
        console.print(comparison.comparison_table(results, "a title"))
    said = captured.get()
    for text in ("62.0 ± 2.8", "63.0 ± 2.8", "70.0", "50.0", "51.0", "1,234", "0.50 %", "majority class"):
        assert text in said
    results["settings"] = tool.settings(options_of(tool, tmp_path, "train"), ["rte"])
    path = tmp_path / "real-text-x.json"
    path.write_text(json.dumps({"machine": tool.where_runs_ran(), "results": results}))
    plots = importlib.import_module("plots")
    assert plots.draw(path).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_a_process_of_its_own_and_is_not_trained_twice(tool, runs, tmp_path, monkeypatch):
    saved_t5(tmp_path / "t5")
    data_folder(tmp_path / "data", ("cola",))
    options = options_of(tool, tmp_path, "train", "--reduction", "4", "--embedding", "4")
    config = {**tool.configuration(options, "adapters", ["cola"], 0), "max_steps": 1}
    first = runs.train(tmp_path / "work" / "one", config)
    assert first["variant"] == "adapters" and first["steps"] == 1
    started = []
    monkeypatch.setattr(runs, "command", lambda *arguments, log: started.append(arguments))
    assert runs.train(tmp_path / "work" / "one", config) == first and not started
    with pytest.raises(FileNotFoundError):  # the stand-in trains nothing
        runs.train(tmp_path / "work" / "one", {**config, "max_steps": 2})
    assert started[0][0] == "train"


def test_a_run_that_fails_shows_the_end_of_its_log(runs, tmp_path):
    with pytest.raises(RuntimeError, match=r"hyperformer-fast nonsense failed[\s\S]*invalid choice: 'nonsense'"):
        runs.command("nonsense", log=tmp_path / "log")
