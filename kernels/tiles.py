"""Which tile a kernel runs with: by (d, b, dtype, norms, architecture), never by the number of rows, never tuned in a
call. `hyperformer-fast tune` writes a table that goes before the rules here.

docs/triton_gate.md has what each compiles to: registers, shared memory, spills.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

#: Names the file of a table; without it the one in the user's cache is read, where there is one.
TABLE_VARIABLE = "HYPERFORMER_FAST_TILES"


class Tile(NamedTuple):
    """BM rows and BK columns at a time; KEEP whole rows in registers."""

    BM: int
    BK: int
    warps: int
    stages: int = 2
    keep: bool = False


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability times ten; 0 off NVIDIA GPUs."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def table_path() -> Path:
    """Where the table is, or would be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(TABLE_VARIABLE) or cache / "hyperformer_fast/tiles.json")


def key(kernel: str, d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> str:
    norm = ", pre-norm" if pre_norm else ""
    return f"{kernel}, d={d}, b={b}, {str(dtype).removeprefix('torch.')}{norm}, sm_{arch}"


def read(path: Path) -> dict[str, Tile]:
    """The table in a file, by :func:`key`; empty where there is none.

    Raises:
        ValueError: the file is not a table, or an entry is not a tile; names both, and the cure.
    """
    if not path.exists():
        return {}
    cure = f"delete it, or write it anew with: hyperformer-fast tune --out {path}"
    try:
        entries = {name: Tile(**entry) for name, entry in json.loads(path.read_text())["tiles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of tiles ({error}): {cure}") from error
    power = lambda n: isinstance(n, int) and 16 <= n <= 256 and n & (n - 1) == 0  # noqa: E731
    for name, tile in entries.items():
        if not (power(tile.BM) and power(tile.BK) and tile.warps in (1, 2, 4, 8, 16) and tile.stages in range(1, 6)):
            raise ValueError(
                f"{path}: {name}: BM and BK must be powers of two from 16 to 256, warps one of 1 to 16, stages 1 to 5, "
                f"got {tile}: {cure}"
            )
    return entries


@functools.cache
def _table() -> dict[str, Tile]:
    return read(table_path())


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Run ``kernel`` (a rule's name) with ``tile`` whatever the table says."""
    _forced[kernel] = tile
    try:
        yield
    finally:
        del _forced[kernel]


def _tabled(rule: Callable[..., Tile]) -> Callable[..., Tile]:
    kernel = rule.__name__

    @functools.cache
    def looked_up(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
        # a table is for GPUs: arch is 0 in the interpreter
        tile = _table().get(key(kernel, d, b, dtype, pre_norm, arch)) if arch else None
        return tile or rule(d, b, dtype, pre_norm, arch)

    @functools.wraps(rule)
    def choose(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
        return _forced.get(kernel) or looked_up(d, b, dtype, pre_norm, arch)

    choose.rule, choose.forget = rule, looked_up.cache_clear
    return choose


@_tabled
def forward(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    # Kept rows: 256 threads hold 32 rows of 1024 16-bit numbers, or 16 of 2048, in 64 registers each.
    if dtype == torch.float32:
        # at three stages ptxas spills a few numbers for sm_80, but not at b = 16, where it does at two
        return Tile(32, 32, 4, stages=3 if arch >= 90 or b <= 16 else 2)
    if b <= 64 and d <= 2048:
        return Tile(32 if d <= (768 if pre_norm else 1024) else 16, 128, 8, keep=True)
    return Tile(32, 64, 4)


@_tabled
def backward(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    if dtype == torch.float32:
        if b > 64:
            return Tile(32, 32, 8, stages=1)
        if b > 32:
            return Tile(16, 32, 4)
        return Tile(32, 32, 4, stages=3 if pre_norm and arch < 90 else 2)
    # Two more row operands than the forward's live beside the kept rows, so there are half as many.
    if b <= 64 and d <= 2048 and not (pre_norm and 0 < arch < 90):
        return Tile(16, 128, 4 if b <= 32 and d <= 768 else 8, keep=True)
    return Tile(32, 64, 4 if b <= 64 else 8)


@_tabled
def weights(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    if b > 64:
        return Tile(16, 64, 8)
    # ptxas spills a few numbers at 4 warps for sm_80, and at 8 for sm_90
    if pre_norm and dtype != torch.float32 and arch >= 90:
        return Tile(32, 32, 4)
    return Tile(32, 64, 8 if dtype == torch.float32 or arch < 90 else 4)


@functools.cache
def finish(d: int, b: int) -> Tile:
    # Partial sums are added one after another: narrow programs, so that there are enough of them.
    return Tile(0, 16, 4) if b <= 64 else Tile(0, 32, 8)


@functools.cache
def generate(k: int, dtype: torch.dtype) -> Tile:
    """BM rows of a generator; BK covers k where it can, and G's piece then stays on chip."""
    return Tile(64, min(64, max(16, 1 << (k - 1).bit_length())), 4)


@functools.cache
def fold(d: int, b: int) -> Tile:
    if b > 64:
        return Tile(0, 16, 8)
    return Tile(0, 64 if b <= 16 else 32, 4 if b <= 32 else 8)
