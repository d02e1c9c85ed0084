"""benchmarks/gpu_report.py without a GPU: what fails is named, what was measured stays, and nothing lives on."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hyperformer_fast import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

needs_library = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def has_ended(pid: int) -> bool:
    """Whether a process ends within half a minute."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with contextlib.closing(os.fdopen(handle)):
        return bool(select.select([handle], [], [], 30)[0])


def python(code: str) -> list[str]:
    """The command of a child that runs ``code`` with the function ``write``."""
    start = "from gpu import children\nwrite = children.writer()\n"
    return [sys.executable, "-c", start + textwrap.dedent(code)]


def test_entries_come_as_they_are_written(module):
    children, entries = module("gpu.children"), []
    code = """
    for i in range(3):
        write({"i": i})
    print("to be heard")
    """
    ended = children.run(python(code), 60, entries.append)
    assert entries == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert (ended.status, ended.detail) == ("done", "") and "to be heard" in ended.said


@pytest.mark.parametrize(
    ("end", "status", "detail"),
    [
        ("import os; os.abort()", "crashed", "killed by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "killed by SIGSEGV"),
        ("raise SystemExit(3)", "failed", "exit code 3"),
        ("raise ValueError('a reason')", "failed", "exit code 1"),
    ],
)
def test_a_part_that_ends_badly_leaves_what_it_wrote(module, end, status, detail):
    children, entries = module("gpu.children"), []
    ended = children.run(python(f"write({{'i': 1}})\n{end}"), 60, entries.append)
    assert entries == [{"i": 1}] and (ended.status, ended.detail) == (status, detail)
    assert "a reason" in ended.said or "ValueError" not in end


HANGS = """
import signal, subprocess, sys
started = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
write({"started": started.pid})
"""


@pytest.mark.parametrize("then", ["signal.pause()", "write.__closure__[0].cell_contents.close(); signal.pause()"])
def test_a_part_that_hangs_is_killed_with_what_it_started(module, then):
    children, entries, now = module("gpu.children"), [], [0.0]

    def late(entry):
        entries.append(entry)
        now[0] = 100.0

    ended = children.run(python(HANGS + then), 99, late, clock=lambda: now[0])
    assert (ended.status, ended.detail) == ("timed out", "killed after 99 s")
    assert has_ended(entries[0]["started"])


def test_what_a_part_started_does_not_outlive_it(module):
    children, entries = module("gpu.children"), []
    assert children.run(python(HANGS), 60, entries.append).status == "done"
    assert has_ended(entries[0]["started"])


def test_carried_packages_stay_visible(module, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    folders = module("gpu.children").environment()["PYTHONPATH"].split(os.pathsep)
    assert folders == [*(str(BENCHMARKS.parent / name) for name in ("", "tests", "benchmarks")), "/tmp/site"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--dry-run", *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A dry run with a failure of every kind: the process that ended, and the results of each part."""
    folder = tmp_path_factory.mktemp("report")
    plants = ["kernels=wrong", "small=missing", "memory=abort", "step=hang"]
    parts = [plant.partition("=")[0] for plant in plants]
    arguments = ["--parts", *parts, "--plant", *plants, "--budget", "step=3", "--output", str(folder)]
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True)
    (path,) = folder.glob("*.json")
    return done, json.loads(path.read_text())["results"]


@needs_library
def test_a_dry_run_with_planted_failures_measures_the_rest(planted):
    done, results = planted
    assert done.returncode == 1, done.stdout + done.stderr
    assert {name: part["status"] for name, part in results.items()} == {
        "machine": "done", "kernels": "done", "small": "done", "memory": "crashed", "step": "timed out",
    }  # fmt: skip
    assert results["machine"]["entries"][0]["packages"]["torch"]
    assert results["memory"]["entries"] == [{"line": "planted: before the crash"}]


@needs_library
def test_a_dry_run_says_what_failed(planted):
    said = planted[0].stdout
    failed = {line.removeprefix("FAILED: ") for line in said.splitlines() if line.startswith("FAILED")}
    assert {
        "memory: crashed: killed by SIGABRT",
        "step: timed out: killed after 3 s",
        "small: none of our backends is available on cpu",
        "kernels: wrong: forward: out: off by 1.0e-01 relative to float64",
    } <= failed


@needs_library
def test_a_wrong_result_has_no_number(planted):
    entries = planted[1]["kernels"]["entries"]
    for entry in entries:
        assert ("wrong" in entry) == (entry["kind"] == "adapter") == ("seconds" not in entry)
    assert {entry["kind"] for entry in entries} == {"adapter", "stack"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_cut_off_leaves_its_entries_and_no_process(tmp_path, number):
    arguments = ["--parts", "memory", "--plant", "memory=hang", "--budget", "memory=600", "--output", str(tmp_path)]
    run = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    with run:
        said = next(line for line in run.stdout if "before the hang" in line)
        run.send_signal(number)
    assert "memory: planted" in said
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert results["machine"]["status"] == "done" and results["memory"]["status"] == "running"
    assert has_ended(results["memory"]["entries"][0]["started"])


def test_what_there_is_no_time_for_is_named(tmp_path):
    arguments = ["--parts", "memory", "--limit", "1", "--output", str(tmp_path)]
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED: machine: skipped: no time is left" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-report-unknown.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--budget", "nothing=3"), "'nothing=3' is not PART=VALUE"), (("--budget", "step=soon"), "could not convert"),
     (("--plant", "step=flood"), "got flood"), (("--parts", "nothing"), "invalid choice: 'nothing'")],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, said):
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


COMPILE_ONE = """
import json, torch
from gpu import compilation
from hyperformer_fast import ops
with compilation.without_a_gpu(90), compilation.counted() as counts:
    compilation.relocate(compilation.cache_folder())
    ops.generate_weights(torch.zeros(1, 2, 16), torch.zeros(1, 40, 16), torch.zeros(1, 40))
print(json.dumps(counts["ours"]))
"""


def test_a_cache_that_was_carried_elsewhere_is_hit(module, tmp_path):
    pytest.importorskip("triton")
    children, counts = module("gpu.children"), []
    for place in (tmp_path / "here", tmp_path / "there"):
        if counts:
            (tmp_path / "here").rename(place)
        environment = {**children.environment(), "TRITON_CACHE_DIR": str(place)}
        done = subprocess.run([sys.executable, "-c", COMPILE_ONE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = counts
    assert (first["compiled"], first["from_cache"]) == (1, 0)
    assert (second["compiled"], second["from_cache"]) == (0, 1)


def test_a_cache_of_another_triton_is_said_to_be_of_no_use(module, tmp_path):
    compilation = module("gpu.compilation")
    mine = {"version": "3.9.0", "files": "a"}
    (tmp_path / compilation.MADE_BY).write_text(json.dumps({"version": "3.6.0", "files": "a"}))
    (entry,) = compilation.strangers(tmp_path, mine)
    assert entry["absent"] == {"warm cache": "made with version '3.6.0', here '3.9.0'"}
    (tmp_path / compilation.MADE_BY).write_text(json.dumps(mine))
    assert not list(compilation.strangers(tmp_path, mine))


def test_every_part_has_its_function(module, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "tests")
    child, plan = module("gpu.child"), module("gpu.plan")
    assert all(callable(child.entries_of(name)) for name in plan.PARTS)
    assert sum(part.budget for part in plan.PARTS.values() if not part.asked) <= 1.5 * plan.LIMIT
