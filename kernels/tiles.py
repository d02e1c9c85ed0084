"""Which tile a kernel runs with: by (d, b, dtype, norms, architecture), never by the number of rows, never tuned in a
call.

docs/triton_gate.md has what each compiles to: registers, shared memory, no spills.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


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


@functools.cache
def forward(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    # Kept rows: 256 threads hold 32 rows of 1024 16-bit numbers, or 16 of 2048, in 64 registers each.
    if dtype == torch.float32:
        return Tile(32, 32, 4)
    if b <= 32 and d <= 512:
        return Tile(32, 128, 4, keep=True)
    if b <= 64 and d <= 2048:
        return Tile(32 if d <= 1024 else 16, 128, 8, keep=True)
    return Tile(32, 64, 4)


@functools.cache
def backward(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    # Two more row operands than the forward live beside the kept rows, so there are half as many.
    if dtype == torch.float32:
        return Tile(32, 32, 4)
    if b <= 64 and d <= 2048:
        return Tile(16, 128, 4 if b <= 16 and d <= 512 else 8, keep=True)
    return Tile(32, 64, 4)


@functools.cache
def weights(d: int, b: int, dtype: torch.dtype, pre_norm: bool, arch: int) -> Tile:
    return Tile(32, 64, 4)


@functools.cache
def finish(d: int, b: int) -> Tile:
    return Tile(0, 32, 8)


@functools.cache
def generate(k: int, dtype: torch.dtype) -> Tile:
    """BM rows of a generator; BK covers k where it can, and G's piece then stays on chip."""
    return Tile(64, min(64, max(16, 1 << (k - 1).bit_length())), 4)


@functools.cache
def fold(d: int, b: int) -> Tile:
    return Tile(0, 64 if b <= 16 else 32, 4 if b <= 32 else 8)
