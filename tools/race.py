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
        r"PART \+= segment\.to\(tl\.int64\) \* SIZE",
        "PART += 0",
        "two program instances|race",
    ),
    Plant(
        "a norm's weight gradients in one place",
        "kernels/residual.py",
        r"tl\.store\(PART \+ program \* D \+ column, dweight,",
        "tl.store(PART + column, dweight,",
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
    """Run every kernel against the reference. ttsem calls its CPU "cuda"."""
    adapters()
    pieces()


def adapters() -> None:
    """An adapter's kernels at two shapes, with tasks and without."""
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


def pieces() -> None:
    """The pieces between a T5's matrix products, with widths that end within a tile."""
    import torch

    from hyperformer_fast import t5_reference as truth
    from hyperformer_fast.kernels import entry
    from hyperformer_fast.layout import Dropout

    def each(function, arguments, convert):
        moved = [
            a._replace(seed=a.seed.to("cuda") if convert is cuda else a.seed) if isinstance(a, Dropout)
            else convert(a) if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a.to("cuda") if isinstance(a, torch.Tensor) and convert is cuda else a
            for a in arguments
        ]  # fmt: skip
        found = function(*moved)
        return found if isinstance(found, tuple) else (found,)

    def cuda(t):
        return t.to("cuda")

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    dropout = Dropout(0.25, torch.tensor([-3]), 1)
    x, y, weight, scores = draw(3, 35, 44), draw(3, 35, 44), draw(44), draw(2, 3, 5, 41)
    out, normed, rstd = truth.residual_forward(x, y, dropout, weight, 1e-6, True)
    mask, logits = torch.arange(41).expand(2, 1, 1, 41) < 30, draw(6, 5000)
    labels = torch.tensor([0, 4999, -100, 7, 7, 1])
    calls = {
        "residual_forward": (x, y, dropout, weight, 1e-6, True),
        "residual_backward": (x, normed, out, weight, rstd, dropout, True, True),
        "act_dropout_forward": (x, y, "gelu_new", dropout),
        "act_dropout_backward": (x, y, out, "gelu_new", dropout),
        "softmax_dropout_forward": (scores, draw(1, 3, 5, 41), mask, dropout, True),
        "softmax_dropout_backward": (scores, scores.softmax(-1), dropout),
        "cross_entropy_forward": (logits, labels, 0.1, -100, True),
    }
    for name, arguments in calls.items():
        mine = each(getattr(entry, name), arguments, cuda)
        exact = each(getattr(truth, name), arguments, lambda t: t.double())
        for i, (a, t) in enumerate(zip(mine, exact)):
            error = ((a.cpu().double() - t).norm() / t.norm()).item()
            assert error <= 1e-6, f"result {i} of {name} is {error:.1e} off"


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
