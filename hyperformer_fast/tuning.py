"""``hyperformer-fast tune``: time tiles of the Triton kernels on this GPU, and save the fastest in a table.

The table's key is (kernel, d, b, dtype, pre-norm, architecture, Triton's version): another version compiles the same
tile to other code. Tiles are timed with one number of rows and used for any number; no call of an op ever tunes.

A time is the GPU's own: launches are captured in a CUDA graph and take turns with buffers that the L2 cache cannot hold
together (graph_timing.py).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import graph_timing
from .backends.triton import TritonBackend
from .extras import require
from .layout import AdapterLayout, AdapterSpec

if TYPE_CHECKING:
    from .kernels.tiles import Tile

#: Replace the rule's tile only if the new one takes under 97 % of its time; smaller gains are noise.
GAIN = 0.97

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def candidates(kernel: str) -> list[Tile]:
    """Return the tiles to try for a kernel of ``kernels/tiles.py``."""
    from .kernels.tiles import Tile

    plain = [Tile(*shape) for shape in itertools.product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3))]
    if kernel == "weights":
        return plain
    return plain + [Tile(BM, BK, warps, 2, True) for BM, BK, warps in itertools.product((16, 32), (64, 128), (4, 8))]


#: A call of a kernel that returns its results.
Call = Callable[[], list[Tensor]]


def on_the_gpu(calls: Sequence[Call]) -> float:
    """Return the median seconds of a launch, with calls that take turns in a CUDA graph."""
    return graph_timing.median_seconds(graph_timing.record(calls, torch.device("cuda")))


def calls(layout: AdapterLayout, dtype: torch.dtype, rows: int, device: str) -> dict[str, list[Call]]:
    """Return, for each kernel of ``kernels/tiles.py``, functions that run it and return its results. Those of one
    kernel do the same on buffers of their own."""
    backend = TritonBackend()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    packed = (draw(1, layout.numel) * 0.05).to(device)
    layout.unpack(packed)["post_gamma" if layout.post_norm else "up_bias"].add_(1)
    x, g = (draw(rows, layout.d).to(dtype).to(device) for _ in range(2))
    spec, folded = AdapterSpec(layout, "gelu_new"), backend.fold(packed, layout, dtype)

    def on_buffers(x: Tensor, g: Tensor) -> dict[str, Call]:
        _, saved = backend.adapter_forward(x, folded, spec, None, True)

        def backward(need_dx: bool, need_dpacked: bool) -> list[Tensor]:
            found = backend.adapter_backward(g, x, saved, packed, folded, spec, None, need_dx, need_dpacked)
            return [part for part in found if part.numel()]

        return {
            "forward": lambda: [backend.adapter_forward(x, folded, spec, None, True)[0]],
            "backward": lambda: backward(True, False),
            "weights": lambda: backward(False, True),
        }

    count = graph_timing.buffers(x.numel() * x.element_size(), device)
    found = [on_buffers(x.clone(), g.clone()) for _ in range(count)]
    return {kernel: [each[kernel] for each in found] for kernel in found[0]}


def _agrees(mine: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> bool:
    """Return whether two tiles' results are finite and agree up to the order of summation and one rounding."""
    near = lambda a, b: (a.double() - b.double()).norm() <= 4 * torch.finfo(dtype).eps * b.double().norm()  # noqa: E731
    return all(bool(near(a, b)) for a, b in zip(mine, expected, strict=True))


def tune(
    layout: AdapterLayout,
    dtype: torch.dtype,
    rows: int,
    timer: Callable[[Sequence[Call]], float] = on_the_gpu,
    device: str = "cuda",
    tiles_of: Callable[[str], list[Tile]] = candidates,
    tried: Callable[[str], object] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Find the tiles that are faster than the rule's on this GPU, and return them as entries of a table.

    A tile that does not compile, does not fit on the GPU or gives other results is skipped.

    Args:
        layout: the adapter's layout.
        dtype: dtype of x.
        rows: the number of rows N to time with.
        timer: a function that returns the seconds that one of several calls takes, which do the same on buffers of
            their own.
        device: the device to run on.
        tiles_of: a function that returns the tiles to try for a kernel.
        tried: a function that is called with one line of text for each tile that was tried.
    """
    from .kernels import tiles

    arch, entries = tiles.architecture(torch.device(device)), {}
    facts = layout.d, layout.b, dtype, layout.pre_norm, arch
    for kernel, same in calls(layout, dtype, rows, device).items():
        rule = getattr(tiles, kernel).rule(*facts)
        with tiles.forced(kernel, rule):
            expected, least = same[0](), timer(same) * GAIN
        best = None
        for tile in tiles_of(kernel):
            with tiles.forced(kernel, tile):
                try:
                    seconds = timer(same) if _agrees(same[0](), expected, dtype) else None
                except Exception as error:  # an error of Triton or ptxas, or lack of shared memory
                    tried(f"{kernel} {tuple(tile)}: {type(error).__name__}")
                    continue
            tried(
                f"{kernel} {tuple(tile)}: {'wrong' if seconds is None else f'{least / GAIN / seconds:.2f}x the rule'}"
            )
            if seconds is not None and seconds < least:
                best, least = tile, seconds
        if best is not None:
            entries[tiles.key(kernel, *facts)] = best._asdict()
    return entries


def merge(path: Path, entries: dict[str, dict[str, Any]], device: str) -> int:
    """Merge ``entries`` into the table at ``path`` atomically, and drop entries that name no version of Triton, which
    nothing reads. Returns how many entries the table then has."""
    from .kernels import tiles

    kept = {name: tile._asdict() for name, tile in tiles.read(path).items() if tiles.names_version(name)}
    everything = kept | entries
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"device": device, "tiles": dict(sorted(everything.items()))}, indent=1) + "\n")
    os.replace(temporary, path)
    return len(everything)


def main(
    widths: list[int], bottlenecks: list[int], dtypes: list[str], pre_norm: bool, rows: int, out: Path | None
) -> None:
    """Tune every combination and write the table.

    Raises:
        ValueError: there is no GPU to tune for, or the file that the table would be merged into is not a table.
    """
    require("tuning", "rich")
    from rich.progress import Progress, TaskID

    if not torch.cuda.is_available():
        raise ValueError("tune times kernels on a GPU, and torch sees no CUDA or HIP device")
    if reason := TritonBackend().availability().reason:
        raise ValueError(reason)
    from .kernels import tiles

    path = out or tiles.table_path()
    tiles.read(path)  # fail on an unreadable table before tuning for minutes
    combinations = list(itertools.product(widths, bottlenecks, dtypes))
    with Progress() as progress:
        total = sum(len(candidates(kernel)) for kernel in ("forward", "backward", "weights"))
        for d, b, dtype in combinations:
            task = progress.add_task(f"d={d} b={b} {dtype}", total=total)

            def tried(line: str, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=line)

            entries = tune(AdapterLayout(d, b, pre_norm), DTYPES[dtype], rows, tried=tried)
            count = merge(path, entries, torch.cuda.get_device_name())
            progress.update(task, description=f"d={d} b={b} {dtype}: {len(entries)} of 3 kernels faster than the rules")
    print(f"{path}: {count} tiles; read at the next start" + (f" with {tiles.TABLE_VARIABLE}={path}" if out else ""))
