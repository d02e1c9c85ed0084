"""What an adapter keeps for its backward, ours beside eager PyTorch's.

python benchmarks/memory.py [--quick] [--output DIR]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from providers import ACTIVATION, Case
from timing import arguments, machine, show, write
from torch import Tensor

from hyperformer_fast import ops, reference


def saved_tensors(call: Callable[[], object]) -> list[Tensor]:
    """The tensors that autograd keeps for the backward of ``call()``, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        # detached: a node that keeps its own output with a grad_fn is a cycle, which is never freed
        t = t.detach()
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # it lives until the end, so that no storage is freed and counted for another
    del result
    return list(kept.values())


def saved_bytes(call: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``call()``, each storage once and whole.

    Args:
        own: tensors that stay anyhow, as parameters do, and do not count.
    """
    stays = {t.untyped_storage().data_ptr() for t in own}
    storages = [t.untyped_storage() for t in saved_tensors(call)]
    return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in stays)


def bytes_per_row(tensors: list[Tensor], N: int) -> float:
    """Bytes per row of the tensors with N rows; the others depend on the weights alone, whatever N is."""
    return sum(t.numel() * t.element_size() for t in tensors if t.dim() and t.shape[0] == N) / N


def measure(case: Case) -> dict:
    x, packed = case.x.clone().requires_grad_(), case.packed.clone().requires_grad_()
    folded = ops.fold(packed, case.layout, case.dtype)
    ours = saved_tensors(lambda: ops.adapter(x, packed, case.layout, ACTIVATION, folded))
    eager = saved_tensors(lambda: reference.adapter(x, packed, case.layout, ACTIVATION))
    row = case.d * case.x.element_size()
    return {
        "d": case.d, "b": case.b, "dtype": str(case.dtype).removeprefix("torch."),
        "ours": bytes_per_row(ours, case.N) / row, "eager": bytes_per_row(eager, case.N) / row,
        "shapes": [[*t.shape] for t in ours if t.dim() and t.shape[0] == case.N],
    }  # fmt: skip


def main() -> None:
    options = arguments(__doc__, quick="few rows").parse_args()
    N = 97 if options.quick else 4097
    where = machine()
    cases = [Case(N, 768, b, dtype) for b in (24, 96) for dtype in (torch.float32, torch.bfloat16)]
    results = [measure(case) for case in cases]
    rows = [(r["d"], r["b"], r["dtype"], r["ours"], r["eager"], " ".join(map(str, r["shapes"]))) for r in results]
    columns = ("d", "b", "dtype", "ours", "eager", "what ours keeps")
    show(f"Kept for the backward, in sizes of x; N={N}", where, columns, rows)
    write("memory", where, results, options.output)


if __name__ == "__main__":
    main()
