"""Tuning with a clock of its own: which tile is taken, what is passed over, and the table that comes of it."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import torch
import triton

from hyperformer_fast import tuning
from hyperformer_fast.kernels import tiles
from hyperformer_fast.kernels.tiles import Tile
from hyperformer_fast.layout import AdapterLayout

LAYOUT = AdapterLayout(40, 5)


def tuned(monkeypatch, seconds_of, tried):
    """Each kernel with three tiles; a tile's time is ``seconds_of`` it."""

    def timer(calls):
        return seconds_of(next(iter(tiles._forced.values())))

    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    return tuning.tune(
        LAYOUT,
        torch.float32,
        33,
        timer,
        "cpu",
        lambda kernel: [Tile(16, 32, 4), Tile(16, 16, 4), Tile(32, 16, 4)],
        tried,
    )


@contextlib.contextmanager
def table(monkeypatch, path):
    """Within the block, tiles are chosen with the table at ``path``."""

    def forget():
        for kernel in ("forward", "backward", "weights"):
            getattr(tiles, kernel).forget()
        tiles._table.cache_clear()

    with monkeypatch.context() as patched:
        patched.setenv(tiles.TABLE_VARIABLE, str(path))
        forget()
        try:
            yield
        finally:
            forget()


def test_the_fastest_tile_is_kept(monkeypatch, tmp_path):
    tried = []
    entries = tuned(monkeypatch, lambda tile: tile.BM * tile.BK, tried.append)
    assert set(entries) == {
        f"{kernel}, d=40, b=5, float32, sm_90, triton {triton.__version__}"
        for kernel in ("forward", "backward", "weights")
    }
    assert all(Tile(**entry) == Tile(16, 16, 4) for entry in entries.values()) and len(tried) == 9
    path = tmp_path / "deep/tiles.json"
    assert tuning.merge(path, entries, "a GPU") == 3
    assert (
        tuning.merge(path, {tiles.key("forward", 768, 24, torch.bfloat16, True, 90): Tile(32, 64, 8)._asdict()}, "")
        == 4
    )
    name = f"forward, d=768, b=24, bfloat16, pre-norm, sm_90, triton {triton.__version__}"
    assert tiles.read(path)[name] == Tile(32, 64, 8)
    assert [entry.name for entry in path.parent.iterdir()] == ["tiles.json"]


def test_a_rule_is_kept_where_nothing_is_faster(monkeypatch):
    assert tuned(monkeypatch, lambda tile: 1.0, lambda line: None) == {}


def test_what_fails_or_is_wrong_is_passed_over(monkeypatch):
    tried = []

    def seconds_of(tile):
        if tile == Tile(16, 16, 4):
            raise RuntimeError("out of resource: shared memory")
        return 1.0 / tile.BM if tile in (Tile(16, 32, 4), Tile(32, 16, 4)) else 1.0

    entries = tuned(monkeypatch, seconds_of, tried.append)
    assert all(Tile(**entry) == Tile(32, 16, 4) for entry in entries.values()) and len(entries) == 3
    assert sum("RuntimeError" in line for line in tried) == 3
    monkeypatch.setattr(tuning, "_agrees", lambda *args: False)
    assert tuned(monkeypatch, seconds_of, tried.append) == {}
    assert any("wrong" in line for line in tried)


def test_a_table_goes_before_the_rules(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    facts = (768, 24, torch.bfloat16, False, 90)
    path.write_text(json.dumps({"tiles": {tiles.key("weights", *facts): Tile(64, 64, 8, 3)._asdict()}}))
    with table(monkeypatch, path):
        assert tiles.weights(*facts) == Tile(64, 64, 8, 3)
        assert tiles.forward(*facts) == tiles.forward.rule(*facts)
        assert tiles.weights(*facts[:4], 80) == tiles.weights.rule(*facts[:4], 80)


def test_tiles_of_another_version_of_triton_are_not_used(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    facts = (768, 24, torch.bfloat16, False, 90)
    with monkeypatch.context() as other:
        other.setattr(triton, "__version__", "3.5.1")
        path.write_text(json.dumps({"tiles": {tiles.key("weights", *facts): Tile(64, 64, 8, 3)._asdict()}}))
    with table(monkeypatch, path), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.weights(*facts) == tiles.weights.rule(*facts)


def test_tiles_that_name_no_version_are_ignored_with_one_warning(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    facts = (768, 24, torch.bfloat16, False, 90)
    old = {"weights, d=768, b=24, bfloat16, sm_90": Tile(64, 64, 8, 3)._asdict()}
    path.write_text(json.dumps({"tiles": old}))
    with table(monkeypatch, path), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert tiles.weights(*facts) == tiles.weights.rule(*facts)
        assert tiles.forward(*facts) == tiles.forward.rule(*facts)
    (warning,) = said
    assert "1 tiles are ignored" in str(warning.message) and "hyperformer-fast tune" in str(warning.message)
    assert tuning.merge(path, {tiles.key("weights", *facts): Tile(32, 64, 8)._asdict()}, "a GPU") == 1


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"tiles": {"forward": {"BM": 16}}}', '{"tiles": {"forward": {"BM": 24, "BK": 32, "warps": 4}}}',
     '{"tiles": {"forward": {"BM": 16, "BK": 32, "warps": 5}}}', '{"tiles": {"forward": 3}}'],
)  # fmt: skip
def test_a_bad_table_is_named(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json.*hyperformer-fast tune --out"):
        tiles.read(path)
