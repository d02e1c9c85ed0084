"""File systems that lack something, are full, or hold what others left: a save works, or says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import small_trainer
from support.t5s import tiny_model, tiny_t5

from hyperformer_fast import HyperFormerModel, atomic, checkpoint
from hyperformer_fast.atomic import write_directory, write_file
from hyperformer_fast.hub import MODEL_FILES
from hyperformer_fast.training.folder import checkpoints, sweep

ROOT = Path(checkpoint.__file__).resolve().parents[1]
LEFT = "partial-0123456789ab"


def save_and_load(folder: Path) -> None:
    model = tiny_model()
    model.save_pretrained(folder / "run")
    model.save_pretrained(folder / "run")
    HyperFormerModel.from_pretrained(folder / "run", t5=tiny_t5())
    assert {path.name for path in (folder / "run").iterdir()} == {*MODEL_FILES}


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_can_be_saved_to(tmp_path, monkeypatch, code):
    asked = []

    def flock(handle, how):
        asked.append(how)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", flock)
    for living in (tmp_path / "run" / f".{checkpoint.WEIGHTS_NAME}.{LEFT}", tmp_path / f".whole.{LEFT}"):
        living.mkdir(parents=True)
    with write_directory(tmp_path / "whole") as whole:
        (whole / "a").write_text("a")
    assert (tmp_path / "whole" / "a").read_text() == "a"
    assert (tmp_path / f".whole.{LEFT}").is_dir(), "without a lock nobody knows that its writer is dead"
    (tmp_path / "run" / f".{checkpoint.WEIGHTS_NAME}.{LEFT}").rmdir()
    save_and_load(tmp_path)
    assert asked


def test_a_training_saves_where_there_are_no_locks(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    small_trainer(tmp_path, save_steps=3).train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_that_cannot_flush_a_directory_can_be_saved_to(tmp_path, monkeypatch, code):
    whole, refused = os.fsync, []

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refused.append(handle)
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        whole(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save_and_load(tmp_path)
    with write_directory(tmp_path / "whole") as partial:
        (partial / "a").write_text("a")
    assert refused and (tmp_path / "whole" / "a").is_file()


def test_a_disk_that_fails_to_flush_is_not_hidden(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"), write_file(tmp_path / "a") as partial:
        partial.write_text("a")
    assert not list(tmp_path.iterdir())


FIFO_THERE = """
import os, sys
from pathlib import Path
from hyperformer_fast.atomic import sweep_leftovers, write_directory, write_file
root = Path(sys.argv[1])
names = [".run.partial-0123456789ab", ".file.partial-0123456789ab"]
for name in names:
    os.mkfifo(root / name)
(root / ".run.partial-ffffffffffff").symlink_to(root / names[0])
with write_directory(root / "run") as partial:
    os.mkfifo(partial / "fifo")
with write_file(root / "file") as partial:
    partial.write_text("a")
sweep_leftovers(root)
print(sorted(path.name for path in root.iterdir()))
"""


def _python(code: str, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, **options)


def test_a_fifo_of_a_partials_name_does_not_hang_the_sweep(tmp_path):
    done = _python(FIFO_THERE, tmp_path)
    left = [".file.partial-0123456789ab", ".run.partial-0123456789ab", ".run.partial-ffffffffffff", "file", "run"]
    assert done.stdout.strip() == str(left), done.stderr


FIFO_LOADED = """
import os, sys, warnings
import torch
from hyperformer_fast.checkpoint import load_checkpoint, save_checkpoint
save_checkpoint(sys.argv[1], {"a": torch.ones(2)}, {})
os.unlink(sys.argv[1] + "/config.json")
os.mkfifo(sys.argv[1] + "/config.json")
warnings.simplefilter("ignore")
print(load_checkpoint(sys.argv[1])[0]["a"].tolist())
os.unlink(sys.argv[1] + "/model.safetensors")
os.mkfifo(sys.argv[1] + "/model.safetensors")
try:
    load_checkpoint(sys.argv[1])
except FileNotFoundError as error:
    print("no file")
"""


def test_a_fifo_of_a_checkpoints_name_does_not_hang_the_load(tmp_path):
    done = _python(FIFO_LOADED, tmp_path / "run")
    assert done.stdout.split("\n")[:2] == ["[1.0, 1.0]", "no file"], done.stderr


def test_sweeping_a_run_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    (tmp_path / "best").mkdir()
    for folder in (tmp_path, tmp_path / "best"):
        (folder / f".best.{LEFT}").mkdir()
        (folder / f".best.{LEFT}" / "a").write_text("a")
        (folder / f".model.safetensors.{LEFT}").write_text("half")
    (tmp_path / ".writable-12345").touch()
    mine = ["best", ".notes.partial-2", ".writable-notes", "x.partial-0123456789ab"]
    for name in mine[1:]:
        (tmp_path / name).touch()
    with write_file(tmp_path / "living") as living:
        living.write_text("half")
        sweep(tmp_path)
        assert living.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "living"])
    assert not list((tmp_path / "best").iterdir())


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device or a pipe has the name"), write_file(tmp_path / "pipe"):
        pytest.fail("nothing should be written")
    assert (tmp_path / "pipe").is_fifo()


SAVES = """
import resource, sys
from pathlib import Path
import torch
from hyperformer_fast.atomic import explain_full_disk, write_directory, write_file
from hyperformer_fast.checkpoint import save_checkpoint
root, limit = Path(sys.argv[1]), int(sys.argv[2])
large = torch.ones(1 << 19)

def with_torch():
    with write_directory(root / "run") as partial:
        torch.save({"a": large}, partial / "optimizer.pt")

def with_text():
    with write_file(root / "file") as partial:
        partial.write_text("a" * (1 << 21))

def nested():
    with explain_full_disk(root / "outer"):
        with_text()

if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for save in (with_torch, with_text, nested, lambda: save_checkpoint(root / "run", {"a": large}, {})):
    try:
        save()
    except OSError as error:
        print(error.errno, error)
"""


def _lines(done) -> list[str]:
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done
    return lines


def _assert_said(lines, root: Path, code: int, text: str) -> None:
    for line, name in zip(lines, ("run", "file", "file", "run/model.safetensors")):
        assert line.startswith(f"{code} [Errno {code}] cannot write {root / name}: {text}"), line
        assert "bytes are free there: free some space, or write to another disk" in line


def test_a_limit_on_files_is_named_and_the_old_stays(tmp_path):
    with write_directory(tmp_path / "run") as partial:
        (partial / "old").write_text("old")
    lines = _lines(_python(SAVES, tmp_path, 1 << 16))
    _assert_said(lines, tmp_path, errno.EFBIG, "File too large (EFBIG)")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert (tmp_path / "run" / "old").read_text() == "old"


@pytest.fixture
def small_disk(tmp_path):
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system of 1 MiB")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_named_and_the_old_stays(small_disk):
    with write_directory(small_disk / "run") as partial:
        (partial / "old").write_text("old")
    lines = _lines(_python(SAVES, small_disk, 0))
    _assert_said(lines, small_disk, errno.ENOSPC, "No space left on device (ENOSPC)")
    assert {path.name for path in small_disk.iterdir()} == {"run"}
    assert (small_disk / "run" / "old").read_text() == "old"


def test_a_training_that_fills_its_files_limit_says_so(tmp_path):
    trainer = small_trainer(tmp_path, save_steps=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OSError, match=r"cannot write .*checkpoint-2.*: File too large \(EFBIG\)"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not checkpoints(tmp_path)


def test_an_error_of_torch_that_is_none_of_the_disks_passes(tmp_path):
    with pytest.raises(RuntimeError, match="^unexpected pos 3 vs 2$"), write_file(tmp_path / "a"):
        raise RuntimeError("unexpected pos 3 vs 2")
    with pytest.raises(FileNotFoundError) as caught, write_file(tmp_path / "a"):
        (tmp_path / "absent").read_text()
    assert "cannot write" not in str(caught.value) and not list(tmp_path.iterdir())
