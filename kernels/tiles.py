"""The choice of each kernel's tile.

A tile depends on d, b, the dtype, the norms and the GPU's architecture. It never depends on the number of rows, and no
call tunes anything. A table written by `hyperformer-fast tune` takes precedence over the rules in this file, for the
version of Triton that it was tuned with.
docs/triton_gate.md lists the registers, the shared memory and the spills of each kernel with its tile.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

#: The environment variable that names the table's file. If it is not set, the table in the user's cache folder is read.
TABLE_VARIABLE = "HYPERFORMER_FAST_TILES"


class Tile(NamedTuple):
    """The sizes with which a kernel is launched."""

    BM: int  #: rows; 0 for a kernel that does not divide rows
    BK: int  #: columns
    warps: int  #: Triton's num_warps
    stages: int = 2  #: Triton's num_stages
    keep: bool = False  #: whether whole rows stay in registers between two passes over their columns


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability without its dot, as 90 for 9.0; 0 for a device that is not an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def table_path() -> Path:
    """The table's file, whether or not it exists."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(TABLE_VARIABLE) or cache / "hyperformer_fast/tiles.json")


def key(kernel: str, d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> str:
    """The name of a table's entry, as ``forward, d=768, b=24, bfloat16, sm_90, triton 3.6.0``."""
    import triton

    norm = ", pre-norm" if pre_norm else ""
    return f"{kernel}, d={d}, b={b}, {str(dtype).removeprefix('torch.')}{norm}, sm_{arch}{_VERSION}{triton.__version__}"


#: What stands before Triton's version in the name of an entry.
_VERSION = ", triton "


def names_version(name: str) -> bool:
    """Whether the name of a table's entry has Triton's version. Tables of earlier releases have entries without."""
    return _VERSION in name


def read(path: Path) -> dict[str, Tile]:
    """Read a table: tiles by :func:`key`. It is empty if the file does not exist.

    Raises:
        ValueError: the file is not a table, or an entry is not a valid tile; the message names the file, the entry and
            the cure.
    """
    if not path.exists():
        return {}
    cure = f"delete it, or write a new one with: hyperformer-fast tune --out {path}"
    try:
        entries = {name: Tile(**entry) for name, entry in json.loads(path.read_text())["tiles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of tiles ({error}): {cure}") from error
    power = lambda n: isinstance(n, int) and 16 <= n <= 256 and n & (n - 1) == 0  # noqa: E731
    for name, tile in entries.items():
        if not (power(tile.BM) and power(tile.BK) and tile.warps in (1, 2, 4, 8, 16) and tile.stages in range(1, 6)):
            raise ValueError(
                f"{path}: {name}: BM and BK must be powers of two from 16 to 256, warps 1, 2, 4, 8 or 16, "
                f"stages from 1 to 5, got {tile}: {cure}"
            )
    return entries


@functools.cache
def _table() -> dict[str, Tile]:
    path = table_path()
    table = read(path)
    if old := sum(not names_version(name) for name in table):
        warnings.warn(
            f"{path}: {old} tiles are ignored, because they do not say with which version of Triton they were tuned: "
            "tune again with: hyperformer-fast tune",
            stacklevel=2,
        )
    return table


_forced: dict[str, Tile] = {}

#: Rises whenever a kernel may get another tile than before. What was derived from a tile is good for one epoch.
epoch = 0


def _new_epoch() -> None:
    global epoch
    epoch += 1


@contextlib.contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Run ``kernel`` with ``tile`` within the block, whatever the table and the rule say.

    Args:
        kernel: the name of a rule: ``forward``, ``backward`` or ``weights``.
        tile: the tile to use.
    """
    _forced[kernel] = tile
    _new_epoch()
    try:
        yield
    finally:
        del _forced[kernel]
        _new_epoch()


def _tabled(rule: Callable[..., Tile]) -> Callable[..., Tile]:
    """Make a forced tile and the table take precedence over ``rule``."""
    kernel = rule.__name__

    @functools.cache
    def looked_up(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
        # The interpreter, for which arch is 0, does not use the table.
        tile = _table().get(key(kernel, d, b, dtype, pre_norm, arch)) if arch else None
        return tile or rule(d, b, dtype, pre_norm, arch)

    @functools.wraps(rule)
    def choose(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
        return _forced.get(kernel) or looked_up(d, b, dtype, pre_norm, arch)

    def forget() -> None:
        looked_up.cache_clear()
        _new_epoch()

    choose.rule, choose.forget = rule, forget
    return choose


def _keeps(d: int, b: int) -> bool:
    """Whether 16-bit rows stay in registers: 32 rows of 1024 numbers, or 16 of 2048, take 64 registers of each of 256
    threads. Rows that do not start at a multiple of 16 bytes would go through shared memory."""
    return b <= 64 and d <= 2048 and d % 8 == 0


def _kept(rows: int, d: int) -> Tile:
    """A tile of ``rows`` rows that stay in registers: one warp for 32 of its columns (fragments.py)."""
    columns = 256 if d > 128 else 128 if d > 64 else 64
    return Tile(rows, columns, columns // 32, keep=True)


@_tabled
def forward(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    """The tile of ``adapter_forward_kernel``."""
    if dtype == torch.float32:
        # For sm_80, three stages make ptxas spill a few registers, except at b = 16, where two stages do.
        return Tile(32, 32, 4, stages=3 if arch >= 90 or b <= 16 else 2)
    if _keeps(d, b):
        return _kept(32 if b <= 32 and d <= (768 if pre_norm else 1024) else 16, d)
    return Tile(32, 64, 4, stages=3 if b > 64 else 2)  # two stages spill at b = 128 on sm_100


@_tabled
def backward(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    """The tile of ``rows_kernel``."""
    if dtype == torch.float32:
        if b > 64:
            return Tile(32, 32, 8, stages=1)
        if b > 32:
            return Tile(16, 32, 4)
        # Where ptxas spills a few registers: with two stages in tf32 on sm_90, with three on sm_100.
        return Tile(32, 32, 4, stages=3 if arch < 100 else 2)
    if _keeps(d, b):
        return _kept(32 if b <= 24 and d <= 768 and not pre_norm else 16, d)
    return Tile(32, 64, 4 if b <= 64 else 8)


@_tabled
def weights(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    """The tile of ``weights_kernel``."""
    if b > 64:
        return Tile(16, 64, 8)
    # For sm_100, three stages make ptxas spill a few registers with a pre-norm.
    return Tile(32, 64, 8 if dtype == torch.float32 else 4, stages=2 if pre_norm and arch >= 100 else 3)


@functools.cache
def finish(d: int, b: int) -> Tile:
    """The tile of ``finish_kernel``; its ``stages`` are the partial sums that a program loads at a time. Each program
    also adds the Gram matrices of all segments, so that narrow tiles read more in all."""
    if b > 64:
        return Tile(0, 32, 8, stages=1)
    return Tile(0, 32, 4 if b <= 32 else 8, stages=4 if b <= 32 else 2)


@functools.cache
def generate(k: int, dtype: torch.dtype) -> Tile:
    """The tile of ``generate_kernel``: BM rows of a generator. BK covers k up to 64; the program's rows of G then stay
    on chip for all embeddings."""
    return Tile(64, min(64, max(16, 1 << (k - 1).bit_length())), 4)


@functools.cache
def gram(arch: int) -> Tile:
    """The tile of ``gram_kernel``: BM rows of W_u a program, and BK a product. On sm_80 and sm_90 tensor cores multiply
    float64, in one product for all rows. Elsewhere every version of Triton but the newest holds the operands of a
    product in registers."""
    return Tile(128, 128 if arch in (80, 90) else 16, 4, stages=1)


@functools.cache
def fold(d: int, b: int) -> Tile:
    """The tile of ``fold_kernel``: columns of W_d and rows of W_u. BK covers d up to 1024; eight units of the
    bottleneck then stay in registers. Beyond b = 32 all warps share a matrix [b, b] of float64."""
    return Tile(0, min(1024, max(16, 1 << (d - 1).bit_length())), 4 if b <= 32 else 8 if b <= 64 else 16, stages=1)


#: Up to as many columns a kernel of the pieces between two products keeps whole rows in registers.
MOST_KEPT = 8192


@functools.cache
def whole_rows(n: int, numbers: int = 2048) -> Tile:
    """The tile of a kernel that needs sums over rows of n numbers: as many rows as have ``numbers`` numbers, at most
    sixteen of them a thread. A longer row than ``MOST_KEPT`` is read in several tiles of four rows."""
    if n > MOST_KEPT:
        return Tile(4, 1024, 8)
    columns = max(16, 1 << (n - 1).bit_length())
    return Tile(max(1, numbers // columns), columns, 4 if columns <= 2048 else 16)


def residual_backward(d: int) -> Tile:
    """The tile of ``residual_backward_kernel``, which holds more for each number: with 2048 of them, or with eight
    warps for 4096 columns, ptxas spills some registers for sm_80."""
    return whole_rows(d, 1024)


@functools.cache
def parts_of_rows(n: int) -> Tile:
    """The tile of ``act_dropout_kernel`` and its backward, which need no sums: 16 numbers a thread."""
    columns = min(1024, max(16, 1 << (n - 1).bit_length()))
    return Tile(2048 // columns, columns, 4)


@functools.cache
def sum_parts(d: int) -> Tile:
    """The tile of ``sum_parts_kernel``: narrow, because its programs are few; ``stages`` are the tiles that a program
    loads at a time."""
    return Tile(64, 32, 4, stages=3)


@functools.cache
def cross_entropy(classes: int) -> Tile:
    """The tile of ``cross_entropy_kernel``: one row, in parts of 4096 classes."""
    columns = min(4096, max(16, 1 << (classes - 1).bit_length()))
    return Tile(1, columns, 8 if columns > 2048 else 4)
