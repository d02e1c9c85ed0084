"""Find data races and accesses out of bounds in the Triton kernels, on a CPU.

    python tools/race.py

ttsem executes the kernels' Triton IR. It stops at an access outside its tensor, and where two programs touch the same
number and one of them writes it. It must be installed (`pip install --no-deps --ignore-requires-python ttsem`, which
`make race` does). At the end faults are planted in a copy of the sources, which the tool must find.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build/race"


class Plant(NamedTuple):
    """A fault to plant in the sources."""

    name: str
    file: str
    pattern: str
    replacement: str
    seen: str  #: a regular expression that the report must match


PLANTS = (
    Plant(
        "partial sums of all stretches in one place",
        "kernels/weight_gradients.py",
        r"PART \+= \(split\.to\(tl\.int64\) \* T \+ task\) \* SIZE",
        "PART += task.to(tl.int64) * SIZE",
        "two program instances|race",
    ),
    Plant(
        "a store without its rows' mask",
        "kernels/common.py",
        r"tl\.store\(base\[:, None\] \+ column\[None, :\], (.*), mask=mask\)",
        r"tl.store(base[:, None] + column[None, :], \1)",
        "past the end",
    ),
)


def kernels() -> None:
    """Run every kernel at two shapes, with tasks and without, against the reference. ttsem calls its CPU "cuda"."""
    import torch

    from hyperformer_fast import reference
    from hyperformer_fast.kernels import entry
    from hyperformer_fast.layout import AdapterLayout, AdapterSpec

    for d, b, rows, pre, dtype, index in (
        (96, 12, 35, False, torch.float32, [1, -1, 0]),
        (768, 24, 133, True, torch.bfloat16, None),
    ):
        layout = AdapterLayout(d, b, pre)
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        E, G, g0 = draw(1, 2, 16), draw(1, layout.numel, 16) * 0.05, draw(1, layout.numel) * 0.3
        x, g = (draw(3, rows, d).to(dtype) for _ in range(2))
        tasks = None if index is None else torch.tensor(index)
        cuda = lambda t: None if t is None else t.to("cuda")  # noqa: E731
        packed = entry.generate_weights(cuda(E), cuda(G), cuda(g0))[0][: 2 if index else 1]
        folded = entry.fold(packed, layout, dtype)
        out, saved = entry.adapter_forward(cuda(x), folded, AdapterSpec(layout, "gelu_new"), cuda(tasks), True)
        dx, dpacked = entry.adapter_backward(
            cuda(g), cuda(x), saved, packed, folded, AdapterSpec(layout, "gelu_new"), cuda(tasks), True, True
        )
        exact = packed.cpu().double().requires_grad_()
        wide = x.double().requires_grad_()
        truth = reference.adapter(wide, exact, layout, "gelu_new", tasks)
        truths = (truth, *torch.autograd.grad(truth, (wide, exact), g.double()))
        for name, mine, t in zip(("out", "dx", "dpacked"), (out, dx, dpacked), truths):
            error = ((mine.cpu().double() - t).norm() / t.norm()).item()
            assert error <= 8 * torch.finfo(dtype).eps, f"{name} is {error:.1e} off, d = {d}"


def run(root: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, "-m", "ttsem.sanitize", str(root / "tools/race.py"), "--kernels"],
        env=environment, cwd=root, capture_output=True, text=True,
    )  # fmt: skip


def main() -> None:
    if "--kernels" in sys.argv:
        return kernels()
    done = run(ROOT)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-3000:])
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\nrace: failed")
    for plant in PLANTS:
        shutil.rmtree(PLACE, ignore_errors=True)
        for name in ("hyperformer_fast", "kernels", "tools"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "assets")
            shutil.copytree(ROOT / name, PLACE / name, symlinks=True, ignore=ignored)
        path = PLACE / plant.file
        text, n = re.subn(plant.pattern, plant.replacement, path.read_text())
        if n != 1:
            sys.exit(f"race: {plant.name}: {plant.file} has {n} places for it, not one")
        path.write_text(text)
        done = run(PLACE)
        report = done.stdout + done.stderr
        if done.returncode == 0 or not re.search(plant.seen, report):
            sys.exit(f"{report[-3000:]}\nrace: {plant.name}: not seen")
        print(f"race: {plant.name}: caught")


if __name__ == "__main__":
    main()
