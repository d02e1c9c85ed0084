"""Every report runs to its end on small inputs; what they measure is checked there before it is timed."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hyperformer_fast import native
from hyperformer_fast.backends import cuda

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

needs_library = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@needs_library
@pytest.mark.parametrize(
    "command",
    [
        "report.py --rows 65 --dtypes fp32 --rounds 1",
        "mixed.py --quick",
        "export.py --quick",
        "stack.py --quick",
        "memory.py --quick",
        "training.py --quick",
        "diagnostics.py --quick --sizes T5-small demo",
        "small.py --device cpu --rows 3 --rounds 1",
        "many_tasks.py --quick",
        "quantised.py --quick",
        pytest.param(
            "products.py --quick",
            marks=pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="needs oneDNN"),
        ),
        "step.py --quick --only T5-small?fp32?training?dropout=0.1?hyperformer++ T5-small?bf16?generate?B=8?*++",
        pytest.param("host.py --quick", marks=pytest.mark.skipif(not find_spec("triton"), reason="needs triton")),
    ],
    ids=lambda command: command.split()[0],
)
def test_a_report_runs(command, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])}
    done = subprocess.run(
        [sys.executable, *command.split(), "--output", str(tmp_path)],
        cwd=BENCHMARKS, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("*.json"))


def test_the_soak_finds_no_wrong_answer(benchmark_module, tmp_path, capsys):
    path = tmp_path / "soak.json"
    with FakeTensorMode():
        without_memory = torch.ones(2)
    # as torch.export leaves one behind; it is alive while the soak looks at all tensors
    torch._C._set_throw_on_mutable_data_ptr(without_memory)
    assert benchmark_module("soak").main(["--quick", "--threads", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["answers"] and found["wrong"] == 0 and found["errors"] == []
    assert found["counts"]["tasks added"] == found["counts"]["tasks removed"] > 0
    assert {"objects", "tensors", "tensors_mb"} <= found["at_rest"][0].keys() & found["grown_when_settled"].keys()
    assert " 0 wrong" in capsys.readouterr().out and without_memory.numel() == 2


def test_a_soak_that_fails_leaves_no_thread(benchmark_module, monkeypatch):
    soak = benchmark_module("soak")
    monkeypatch.setattr(soak.Memory, "now", lambda: 1 / 0)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        soak.Soak(2, 0, ["sentiment"], 1).run(60)
    assert threading.active_count() == before


def test_a_soak_says_which_answer_is_wrong(benchmark_module, capsys):
    soak = benchmark_module("soak").Soak(1, 0, ["sentiment"], 1)
    ((answers),) = soak.expected.values()
    answers["forward"] = answers["forward"] + 1
    answers.update(dict.fromkeys(answers.keys() - {"forward"}, "nothing"))
    found = soak.run(0.2)
    assert found["wrong"] == found["answers"] > 0 and "of sentiment, row 0" in found["first_wrong"][0]


def test_mixed_texts_are_those_of_single_tasks(benchmark_module, capsys):
    assert benchmark_module("mixed_texts").main(["--rows", "14", "--new-tokens", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "other tokens with another task's weights" in said[0] and not said[0].startswith("0 ")
    assert len(said) == 6 and all("14 of 14 rows of 7 tasks are the same" in line for line in said[1:])


def test_mixed_texts_of_real_rows(benchmark_module, shared, capsys):
    places = ["--t5", str(shared("models/t5_mini")), "--data", str(shared("data"))]
    assert benchmark_module("mixed_texts").main([*places, "--new-tokens", "4", "--ways", "greedy"]) == 0
    assert "greedy: 200 of 200 rows" in capsys.readouterr().out


def test_a_mixed_text_that_differs_is_shown(benchmark_module, monkeypatch, capsys):
    tool = benchmark_module("mixed_texts")
    generated = tool.Comparison.generated

    def wrong(self, way, rows, task):
        found = generated(self, way, rows, task)
        return [[*found[0], 7], *found[1:]] if isinstance(task, list) else found

    monkeypatch.setattr(tool.Comparison, "generated", wrong)
    assert tool.main(["--rows", "2", "--new-tokens", "2", "--ways", "greedy"]) == 1
    said = capsys.readouterr().out
    assert "greedy: 1 of 2 rows" in said and "row 0, sentiment:" in said and "7] in company" in said


def pytest_run(*options, **environment):
    # pytest-benchmark times nothing where it believes itself in a worker of pytest-xdist, as this very test may be.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # One thread a process: nothing here is timed in earnest.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(BENCHMARKS), *options], cwd=BENCHMARKS.parent,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """What pytest prints as it collects the short list and the full one, where ``adapters`` is not installed."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(
        "import importlib.util\nfind_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'adapters' else find_spec(name, *rest)\n"
    )
    paths = [str(folder), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {
        name: pytest_run("--collect-only", *options, **environment)
        for name, options in (("short", ()), ("full", ("--full",)))
    }


OPS = ("adapter, forward and backward", "mixed batch", "generate_weights", "fold", "hyper_adapter", "a T5's weights",
       "training step")  # fmt: skip


def test_the_short_list_has_every_op_and_the_full_one_every_shape(collected):
    short, full = ({line for line in words.splitlines() if "<Function" in line} for words in collected.values())
    assert short < full and len(short) < 80 < len(full)
    for op in OPS:
        assert any(f"[{op}" in line for line in short), op
    for shape in ("T5-small r=8 N=1-", "T5-large r=8 N=16384-", "T5-base, 4+4 layers"):
        assert any(shape in line for line in full), shape


@pytest.mark.parametrize("which", ["short", "full"])
def test_a_provider_that_is_absent_is_one_line_and_not_collected(collected, which):
    head, _, tests = collected[which].partition("collected")
    assert head.count("not measured: adapters (pip install adapters)") == 1
    assert "-eager]" in tests and "adapters]" not in tests


@needs_library
def test_a_run_ends_with_a_table_of_ratios():
    said = pytest_run("--benchmark-only", "-k", "fold", HF_BENCH_QUICK="1")
    table = said.partition("Time of each rival over ours")[2]
    assert re.search(r"fold\W+T5-base r=32, 24 sites, 1 task\W+fp32\W+\d+\.\d\dx", table), said[-3000:]
    assert "HF_BENCH_QUICK is no longer read" in said


@pytest.mark.parametrize("name", ["cuda, row by row, one launch", "cuda, rows by 32, three launches"])
def test_a_form_that_fails_leaves_the_library_as_it_was(benchmark_module, monkeypatch, name):
    small = benchmark_module("small")
    limits = {"few_rows": 64}

    def use_few_rows(limit):
        before, limits["few_rows"] = limits["few_rows"], limit
        return before

    monkeypatch.setattr(cuda.CudaBackend, "library", lambda self: SimpleNamespace(use_few_rows=use_few_rows))
    before = cuda.ONE_LAUNCH_ROWS
    with pytest.raises(RuntimeError, match="a kernel failed"), small.form(name):
        assert limits["few_rows"] == small.FORMS[name][0] and cuda.ONE_LAUNCH_ROWS == small.FORMS[name][1]
        raise RuntimeError("a kernel failed")
    assert limits["few_rows"] == 64 and cuda.ONE_LAUNCH_ROWS == before


def test_a_provider_that_computes_something_else_is_not_timed(benchmark_module, monkeypatch):
    providers = benchmark_module("providers")
    wrong = providers.Provider(lambda case: lambda x, packed: x, lambda device: "")
    monkeypatch.setitem(providers.PROVIDERS, "identity", wrong)
    case = providers.Case(3, 16, 4, providers.DTYPES["fp32"])
    with pytest.raises(providers.Wrong, match="identity: out is off by"):
        providers.make("identity", case, False)
    assert providers.make("eager", case, True)()[0].shape == (3, 16)


@needs_library
def test_a_form_that_is_wrong_has_no_ratio(benchmark_module, monkeypatch):
    small = benchmark_module("small")
    right = small.ops.adapter
    monkeypatch.setattr(small.ops, "adapter", lambda *arguments: right(*arguments) * 1.1)
    forward, site = small.measure("cpu", [3], 1)
    assert forward["over_first"] == {} and "off by 1.0e-01" in forward["wrong"]["cpu"]
    assert site["over_first"] == {"cpu": 1.0} and "wrong" not in site


def test_a_rival_that_is_wrong_has_no_ratio_and_is_named(benchmark_module, monkeypatch):
    providers, report = benchmark_module("providers"), benchmark_module("report")
    chosen = {name: providers.PROVIDERS[name] for name in ("eager", providers.OURS)}
    chosen["identity"] = providers.Provider(lambda case: lambda x, packed: x * 1, lambda device: "")
    for module in (providers, report):
        monkeypatch.setattr(module, "PROVIDERS", chosen)
    found = report.measure(providers.Case(3, 16, 4, providers.DTYPES["fp32"]), False, 1)
    assert set(found["ratios"]) == {"eager", providers.OURS}
    assert "identity: out is off by" in found["wrong"]["identity"]


def test_compiled_cases_do_not_meet_each_others_guards(benchmark_module):
    providers = benchmark_module("providers")
    function = providers.eager(providers.Case(3, 16, 4, providers.DTYPES["fp32"]))
    copies = [providers.own_code(function) for _ in range(2)]
    assert len({id(each.__code__) for each in (function, *copies)}) == 3


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, kept open so that they can be looked at."""
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", lambda figure: (figure.canvas.draw(), kept.append(figure)))
    yield kept
    monkeypatch.undo()
    plt.close("all")


#: As gpu_report.py writes it: the legend has long labels.
GPU_REPORT = {
    "machine": {"gpu": "a GPU", "torch": "2.13.0", "backend": "triton"},
    "results": {
        "kernels": {
            "entries": [
                {
                    "backend": backend,
                    "dtype": dtype,
                    "N": N,
                    "tasks": "one",
                    "forward_of_copy_bandwidth": 0.8,
                    "both_of_copy_bandwidth": 0.5,
                }
                for backend, dtype, N in itertools.product(
                    ("triton", "cuda"), ("bfloat16", "float32"), (1024, 4096, 65536)
                )
            ]
        }
    },
}
#: As step.py writes it.
STEP = {
    "machine": {
        "cpu": "a CPU", "torch": "2.13.0", "backend": "cpu", "instruction_set": "AVX512", "threads": "2",
        "our_instruction_set": "avx512",
    },
    "results": {
        f"T5-small {dtype} training dropout=0.1 hyperformer++": {
            "rows": {
                row: {"ratio": 1.0 + 0.1 * i, "quartiles": [0.9 + 0.1 * i, 1.3 + 0.1 * i]}
                for i, row in enumerate(("bare", "bare, fused", "original", "reference", "unfused", "fused"))
            },
            "rounds": 3,
            "components": {row: {"products": 0.7, "rest": 0.3} for row in ("bare", "unfused", "fused")},
            "memory": {},
            "absent": {},
        }
        for dtype in ("fp32", "bf16")
    },
}  # fmt: skip

#: As study.py writes them: many methods and tasks, with long names.
METHODS = ["finetuning", "single_task (default)", "hyperformer-shared (authors)", "hyperformer++ (default)"]
TASKS = {f"task number {i}": {"accuracy": 50.0, "score": 30.0 + i} for i in range(18)}
SETTINGS = {"seeds": 3, "steps": 1500, "batch": 16, "t5": "t5_mini", "tasks": list(TASKS)}
EVALUATED = {"evaluated": {task: {"split": "test", "rows": 250} for task in TASKS}, "settings": SETTINGS}
COMPARISON = {
    "machine": STEP["machine"],
    "results": EVALUATED
    | {
        "majority": {"average_metrics": 40.0, "average_tasks": 40.0, "tasks": TASKS},
        "methods": {
            label: {
                "average_metrics": {"mean": 60.0 + i, "deviation": 1.0},
                "tasks": {task: {"score": {"mean": 55.0 + i, "deviation": 2.0}} for task in TASKS},
            }
            for i, label in enumerate(METHODS)
        },
        "diagnostics": {
            label: {f"{stack}/weight_cosine_mean": [[10, 0.5], [20, 0.25]] for stack in ("encoder", "decoder")}
            for label in METHODS[2:]
        }
        | {METHODS[0]: {}, METHODS[1]: {}},
    },
}
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2]
SWEEP = {
    "machine": STEP["machine"],
    "results": EVALUATED
    | {
        "majority": {"average_metrics": 40.0},
        "methods": {
            label: {
                "rates": [{"rate": rate, "mean": 50.0 + i, "deviation": 1.0} for i, rate in enumerate(RATES)],
                "within": {"best": 1e-2, "low": 1e-3, "high": 1e-2, "factor": 10.0, "points": 3.0},
            }
            for label in METHODS
        },
    },
}
MADE_UP = {
    "gpu-report-made-up.json": GPU_REPORT,
    "step-made-up.json": STEP,
    "compare-made-up.json": COMPARISON,
    "many-made-up.json": COMPARISON,
    "rates-made-up.json": SWEEP,
}
RESULTS = sorted(path for path in (BENCHMARKS / "results").glob("*.json") if path.with_suffix(".png").exists())


@pytest.mark.parametrize("result", [*RESULTS, *map(Path, MADE_UP)], ids=lambda path: path.stem)
def test_plots_have_plain_ticks_and_no_legend_over_the_curves(benchmark_module, figures, tmp_path, result):
    plots = benchmark_module("plots")
    copy = tmp_path / result.name
    copy.write_text(result.read_text() if result in RESULTS else json.dumps(MADE_UP[result.name]))
    assert plots.draw(copy).stat().st_size > 10_000
    (figure,) = figures
    assert figure.legends and not any(axis.get_legend() for axis in figure.axes)
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and whole.y0 <= legend.y0, "the legend leaves the plot"
    for axis in figure.axes:
        assert not legend.overlaps(axis.get_window_extent())
        for tick in (*axis.get_xticklabels(), *axis.get_yticklabels(), *axis.get_yticklabels(minor=True)):
            assert "^" not in tick.get_text() and "times" not in tick.get_text()
    found = json.loads(copy.read_text())["results"]
    if "settings" in found and "methods" in found:
        told = found["settings"]
        for words in ("embedded T5" if told["t5"] == "embedded" else told["t5"], "task", f"{told['steps']} steps"):
            assert words in figure.get_suptitle()
    if result.name.startswith("adapter"):
        assert figure.axes[0].get_ylabel() == "time of the rival over ours\n(above 1: ours is faster)"


def test_results_without_a_plot_are_refused_by_name(benchmark_module, tmp_path):
    plots = benchmark_module("plots")
    (tmp_path / "mixed-x.json").write_text(json.dumps({"machine": {}, "results": []}))
    assert plots.draw(tmp_path / "mixed-x.json") is None
