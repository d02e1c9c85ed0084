"""A run's folder under what happens to folders: two runs, kills, failed starts, links, deletion, odd names."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.runs import data_folder, same_weights, saved_t5

from hyperformer_fast import use_backend
from hyperformer_fast.atomic import write_file
from hyperformer_fast.cli import _message, main
from hyperformer_fast.training import HyperFormerTrainer, RunError, checkpointing, lock
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training.folder import checkpoints
from hyperformer_fast.training.lock import LOCK_NAME, RunLock
from hyperformer_fast.training.progress import progress_bars
from hyperformer_fast.training.report import plot_curves, results_table

QUICK = "--max_steps 4 --per_device_train_batch_size 4 --save_steps 2 --eval_steps 3 --reduction_factor 4".split()
QUICK += "--task_embedding_dim 4 --projected_task_embedding_dim 4 --task_hidden_dim 5 --learning_rate 1e-3".split()
RESUME = ("--resume_from_checkpoint", "true")
WEIGHTS = "model.safetensors"

on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")


@pytest.fixture(autouse=True)
def plot(monkeypatch):
    """Plotting takes most of such a small run's time. A test that needs it puts it back."""
    real = run_module.plot_curves
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: None)
    return real


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that runs ``train`` into a folder and returns its exit code."""
    inputs = tmp_path_factory.mktemp("inputs")
    command = [
        "train",
        "--model_name_or_path",
        saved_t5(inputs / "t5"),
        "--data_dir",
        data_folder(inputs / "data"),
        *QUICK,
    ]
    return lambda folder, *more: main([*command, "--output_dir", str(folder), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of its own for each test."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def at_micro_batch(monkeypatch, number, act):
    """Call ``act`` before the given micro-batch of a training, counted from 1."""
    plain, calls = HyperFormerTrainer.training_step, []

    def training_step(self, *arguments, **named):
        calls.append(1)
        if len(calls) == number:
            act()
        return plain(self, *arguments, **named)

    monkeypatch.setattr(HyperFormerTrainer, "training_step", training_step)


def interrupt():
    raise KeyboardInterrupt


def test_only_one_training_writes_to_a_folder(train, run, capsys):
    before = contents(run)
    with RunLock(run):
        for mode in (["--overwrite_output_dir"], RESUME):
            assert train(run, *mode) == 1
            err = capsys.readouterr().err
            assert f"another training writes to {run} (process {os.getpid()} on " in err and "unexpected" not in err
    assert contents(run) == before
    assert train(run, "--overwrite_output_dir") == 0 and not (run / LOCK_NAME).exists()


def test_a_run_holds_its_folder_until_its_end(train, tmp_path, monkeypatch):
    plain, held = run_module._report, []

    def report(run, *arguments):
        folder = Path(run.training.output_dir)
        with pytest.raises(RunError, match="another training writes to"):
            RunLock(folder)
        held.append(folder)
        return plain(run, *arguments)

    monkeypatch.setattr(run_module, "_report", report)
    assert train(tmp_path / "run") == 0 and held == [tmp_path / "run"]


def test_a_dead_process_holds_nothing(tmp_path):
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            RunLock(tmp_path)
            os.write(writable, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(readable, 1) == b"x"
        with pytest.raises(RunError, match=f"process {child} on"):
            RunLock(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / LOCK_NAME).read_text().startswith(f"{child} on")
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"{os.getpid()} on")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with (
        pytest.warns(UserWarning, match=f"has no locks .{os.strerror(code)}.: nothing keeps another"),
        RunLock(tmp_path),
    ):
        pass


def test_a_lock_leaves_no_folder_that_it_made(tmp_path):
    with RunLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with RunLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


@on_a_cpu
def test_a_refused_backend_leaves_nothing_and_says_why(train, run, tmp_path, capsys):
    before = contents(run)
    with use_backend("cuda"):
        assert train(tmp_path / "new") == 1
        err = capsys.readouterr().err
        assert "backend 'cuda' cannot serve" in err and "unexpected" not in err
        assert train(run, "--overwrite_output_dir") == 1
    assert not (tmp_path / "new").exists() and contents(run) == before
    assert train(tmp_path / "new") == 0


@pytest.mark.parametrize("number", [1, 2])
def test_the_same_start_works_after_an_interruption(train, tmp_path, capsys, monkeypatch, number):
    """Before the first step is trained, and after it but before the first checkpoint."""
    at_micro_batch(monkeypatch, number, interrupt)
    assert train(tmp_path / "run") == 130
    assert "interrupted; nothing was saved yet" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (number == 2)
    if number == 2:
        (tmp_path / "run" / "evaluation.json").touch()
    assert train(tmp_path / "run") == 0
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def test_an_interrupted_run_says_where_it_goes_on(train, finished, tmp_path, capsys, monkeypatch):
    at_micro_batch(monkeypatch, 4, interrupt)
    assert train(tmp_path / "run") == 130
    assert "interrupted; --resume_from_checkpoint true goes on from checkpoint-2" in capsys.readouterr().err
    assert train(tmp_path / "run") == 1 and "holds another run" in capsys.readouterr().err
    assert main(["train", *RESUME, "--output_dir", str(tmp_path / "run")]) == 0
    assert same_weights(tmp_path / "run", finished)


def test_a_linked_checkpoint_is_rotated_and_what_it_leads_to_is_kept(run, tmp_path):
    shutil.rmtree(run / "checkpoint-4")
    (run / WEIGHTS).unlink()
    (run / "checkpoint-2").rename(tmp_path / "elsewhere")
    (run / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    assert main(["train", *RESUME, "--output_dir", str(run), "--save_steps", "1"]) == 0
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-4"]
    assert contents(tmp_path / "elsewhere") == before


def test_a_checkpoint_takes_the_place_of_a_link(run, tmp_path):
    (run / "checkpoint-4").rename(tmp_path / "elsewhere")
    (run / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "optimizer.pt").unlink()
    before = contents(tmp_path / "elsewhere")
    assert main(["train", *RESUME, "--output_dir", str(run)]) == 0
    assert not (run / "checkpoint-4").is_symlink() and contents(tmp_path / "elsewhere") == before
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]


def test_overwriting_takes_links_away_and_what_they_lead_to_is_kept(train, run, tmp_path):
    for name in ("checkpoint-4", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).symlink_to(tmp_path / name)
    assert train(run, "--overwrite_output_dir") == 0 and not (run / "best").exists()
    assert all([path.name for path in (tmp_path / name).iterdir()] == ["mine"] for name in ("checkpoint-4", "best"))


class Killed(BaseException):
    """What no handler of the library stops."""


def test_a_kill_before_rotation_leaves_no_checkpoint_too_many(train, tmp_path, monkeypatch):
    def killed(folder, limit, best):
        if len(checkpoints(folder)) > limit:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpointing, "rotate", killed)
        train(tmp_path, "--save_steps", "1")
    assert len(checkpoints(tmp_path)) == 3
    assert main(["train", *RESUME, "--output_dir", str(tmp_path), "--save_strategy", "no"]) == 0
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_leftovers_of_killed_runs_are_swept(run):
    (run / ".saving").symlink_to(run / "nowhere")
    for name in (f".checkpoint-7.partial-{0:012x}", f".best.partial-{1:012x}", ".checkpoint-3.old"):
        (run / name).mkdir()
        (run / name / "file").touch()
    (run / ".writable-77").touch()
    fifo = run / f".{WEIGHTS}.partial-{2:012x}"
    os.mkfifo(fifo)
    with write_file(run / "evaluation.json") as written:  # by an evaluation that runs at the same time
        assert main(["train", *RESUME, "--output_dir", str(run)]) == 0
        # A FIFO is nothing that a run wrote, whatever its name.
        assert {path.name for path in run.glob(".*")} == {fifo.name, written.name}


def test_a_checkpoint_without_room_is_said_to_be_that(train, run, tmp_path, capsys):
    """A limit on a file's size stands for the disk's: the weights get through, the optimizer's state does not."""
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoint-4").iterdir()}
    limit = (sizes[WEIGHTS] + sizes["optimizer.pt"]) // 2
    assert sizes[WEIGHTS] < limit < sizes["optimizer.pt"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = train(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert code == 1 and f"cannot write {tmp_path / 'new' / 'checkpoint-2'}: File too large (EFBIG)" in err
    assert "bytes are free there" in err and "(unexpected;" not in err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]
    assert train(tmp_path / "new") == 0


@pytest.mark.parametrize("what", ["folder", "run.json"])
def test_what_is_deleted_in_the_run_is_made_again(train, finished, tmp_path, capsys, monkeypatch, what):
    folder = tmp_path / "run"
    doomed = folder if what == "folder" else folder / "run.json"
    at_micro_batch(monkeypatch, 3, lambda: shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink())
    assert train(folder) == 0
    assert "was deleted during the run" in " ".join(capsys.readouterr().out.split())
    assert json.loads((folder / "run.json").read_text())["arguments"]["max_steps"] == 4
    assert same_weights(folder, finished)
    assert main(["evaluate", str(folder)]) == 0


def test_a_folder_that_another_training_has_by_now_is_left_to_it(train, tmp_path, capsys, monkeypatch):
    folder, other = tmp_path / "run", []

    def replace():
        shutil.rmtree(folder)
        other.append(RunLock(folder))

    at_micro_batch(monkeypatch, 3, replace)
    assert train(folder) == 1
    assert "another training writes to" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    other[0].__exit__(None, None, None)


def test_an_evaluation_that_cannot_be_written_is_printed(run, capsys):
    (run / "evaluation.json").mkdir()
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.index("majority class") < out.index("warning: the results above were not written to evaluation.json: ")


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_run_json_that_is_nested_too_deeply_is_named(run, capsys, depth):
    (run / "run.json").write_text('{"format_version": ' + "[" * depth + "]" * depth + "}")
    for command in (["evaluate", str(run)], ["train", *RESUME, "--output_dir", str(run)]):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert f"cannot read {run / 'run.json'}: lists or objects are nested more than 100 deep" in err
        assert "unexpected" not in err


def test_a_failed_plot_fails_no_run(train, tmp_path, capsys, monkeypatch):
    def plot(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(run_module, "plot_curves", plot)
    assert train(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "warning: curves.png could not be plotted: RuntimeError: no font" in out and "majority class" in out
    assert {"metrics.json", "history.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_names_are_neither_formulas_nor_markup(train, tmp_path, capsys, monkeypatch, plot):
    monkeypatch.setattr(run_module, "plot_curves", plot)
    names = ["$frac{$", "[red]one", "_two"]
    data = Path(data_folder(tmp_path / "data", tasks=("cola",)))
    for name in names:
        shutil.copytree(data / "cola", data / name)
    # a path with the end of a markup tag in it
    folder = tmp_path / "[" / "]run"
    assert train(folder, "--data_dir", str(data), "--eval_steps", "2", "--tasks", *names) == 0
    out = capsys.readouterr().out
    assert "could not be plotted" not in out and (folder / "curves.png").exists()
    assert f"are in {folder}" in out
    for name in names:
        # its rows, its scores in two evaluations, its line of the table, and two notes, or three
        assert out.count(name) == 6 + (f"{name}: one text was generated" in out)


def test_tables_bars_and_pictures_take_any_name(tmp_path):
    from matplotlib import pyplot as plt

    name = "[/]$_^{ :bug:"
    metrics = {"accuracy": 1.0, "score": 1.0}
    task = {"split": "test", "rows": 1, "metrics": metrics, "majority": metrics, "unparsed": 1}
    averages = {f"{whose}average_{what}": 1.0 for whose in ("", "majority_") for what in ("metrics", "tasks")}
    results = {"variant": "hyperformer", **averages, "tasks": {name: task}}
    console = Console(width=100, record=True, force_terminal=True)
    console.print(results_table(results))
    with progress_bars(console) as progress:
        progress.add_task(name, total=1, note=name)
    assert console.export_text().count(name) >= 2
    history = [{"step": 1, f"eval_{name}_score": 1.0, "eval__x_score": 2.0}]
    plot_curves(history, {name: 0.0, "_x": 0.0}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size and not plt.get_fignums()


@on_a_cpu
def test_bf16_trains_on_a_cpu(train, tmp_path):
    assert train(tmp_path / "run", "--bf16") == 0


def raised(act) -> str:
    with pytest.raises(Exception) as caught:
        act()
    return _message(caught.value)


def test_only_messages_for_users_stand_alone():
    from hyperformer_fast import HyperFormerConfig

    def fail(error):
        raise error

    assert "unexpected" not in raised(lambda: HyperFormerConfig(tasks=[]))
    assert raised(lambda: fail(RunError("a run"))) == "a run"
    assert raised(lambda: fail(MemoryError())) == "out of memory"
    assert raised(lambda: fail(FileNotFoundError(2, "absent", "x"))) == "[Errno 2] absent: 'x'"
    # a library's, and a fault of our own
    for error in (ValueError("shapes differ"), RuntimeError("mat1"), KeyError("x")):
        assert raised(lambda error=error: fail(error)).startswith(f"{type(error).__name__}: ")
        assert "(unexpected; --debug" in raised(lambda error=error: fail(error))
