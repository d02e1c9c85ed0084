"""Time few rows, as in decoding, and whole sites: our backends, and every form of the CUDA library's kernels.

    python benchmarks/small.py [--device cuda] [--rows 1 8 64 256 1024 4096] [--rounds 15] [--output DIR]

"forward" applies folded weights; "site" generates, folds and applies. Each row belongs to another task than the one
before it. On a GPU every call is also recorded in a CUDA graph ("replayed": the GPU's own time), with rows that take
turns with buffers beyond the L2 cache; the weights stay in it. "called" has the host's time. A form is chosen outside
of what is timed, so that the dispatch of all forms is alike. Ratios are over the first form's time. What was timed is
checked against float64, and a form that is wrong has no ratio.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from providers import ACTIVATION, Case
from timing import Timed, Within, arguments, interleaved, machine, relative_error, show, tolerance, write
from torch import Tensor

from hyperformer_fast import backends, graph_timing, ops, reference
from hyperformer_fast.backends import cuda

T, EMBEDDING = 8, 64
ROWS = (1, 8, 64, 256, 1024, 4096)
#: Limits on the number of rows.
ALWAYS, NEVER = 2**31 - 1, 0
#: For each form of the CUDA library: up to how many rows the forward gives every row a block of its own, and up to how
#: many ``hyper_adapter`` is one launch. None leaves both as they are.
FORMS = {
    "cuda": None,
    "cuda, row by row, three launches": (ALWAYS, NEVER),
    "cuda, rows by 32, three launches": (NEVER, NEVER),
    "cuda, row by row, one launch": (ALWAYS, ALWAYS),
    "cuda, rows by 32, one launch": (NEVER, ALWAYS),
}


def ours(device: str) -> list[str]:
    """Our backends that serve ``device`` here, without the reference."""
    names = ["triton", "cuda"] if device.startswith("cuda") else ["cpu"]
    return [found["name"] for found in backends.backend_report() if found["name"] in names and found["available"]]


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """Force a backend, or a form of the CUDA library, within the block; afterwards all is as before."""
    with backends.use_backend(name.partition(",")[0]):
        if not FORMS.get(name):
            yield
            return
        few, one_launch = FORMS[name]
        library = cuda.CudaBackend().library()
        before = library.use_few_rows(few)
        try:
            with mock.patch.object(cuda, "ONE_LAUNCH_ROWS", one_launch):
                yield
        finally:
            library.use_few_rows(before)


Calls = list[Callable[[], Tensor]]


def inputs(case: Case) -> dict[str, Tensor]:
    """What a site generates its weights from, and the task of each row."""
    generator = torch.Generator().manual_seed(0)
    E, G = (torch.randn(n, EMBEDDING, generator=generator).to(case.device) for n in (T, case.layout.numel))
    return {"E": E, "G": 0.01 * G, "g0": case.packed[0], "index": torch.arange(case.N, device=case.device) % T}


def calls_of(case: Case, backend: str) -> dict[str, Calls]:
    """The calls of a backend by what they do, "forward" and "site", on buffers of their own."""
    E, G, g0, index = inputs(case).values()
    with backends.use_backend(backend):
        packed = ops.generate_weights(E[None], G[None], g0[None])[0]
        folded = ops.fold(packed, case.layout, case.dtype)
    buffers = [case.x.clone() for _ in range(graph_timing.buffers(2 * case.row_bytes, case.device))]
    return {
        "forward": [lambda x=x: ops.adapter(x, packed, case.layout, ACTIVATION, folded, index) for x in buffers],
        "site": [lambda x=x: ops.hyper_adapter(x, E, G, g0, case.layout, ACTIVATION, index) for x in buffers],
    }


def truth_of(case: Case) -> Tensor:
    """What every form must return, in float64."""
    E, G, g0, index = (t.double() if t.is_floating_point() else t for t in inputs(case).values())
    packed = reference.generate_weights(E[None], G[None], g0[None])[0]
    return reference.adapter(case.x.double(), packed, case.layout, ACTIVATION, index)


def forms_of(what: str, backend: str) -> list[str]:
    """The forms to time. The forward of a single launch is the same as with three launches."""
    names = FORMS if backend == "cuda" else [backend]
    return [name for name in names if not (what == "forward" and name.endswith("one launch"))]


@torch.no_grad()
def measure(device: str, rows: list[int], rounds: int) -> Iterator[dict]:
    """For each N, each thing done and each way: the first form's seconds, the ratio of every form over them, and what
    is wrong about the others."""
    for N in rows:
        case = Case(N, 768, 24, torch.bfloat16, device)
        truth, calls = truth_of(case), {backend: calls_of(case, backend) for backend in ours(device)}
        for what in ("forward", "site"):
            ways: dict[str, dict[str, Timed]] = {"called": {}}
            wrong = {}
            for backend, made in calls.items():
                for name in forms_of(what, backend):
                    with form(name):
                        recorded = graph_timing.record(made[what], device)
                        recorded.replay()
                    error = relative_error(recorded.results[-1], truth)
                    if not error <= tolerance(case.dtype):
                        wrong[name] = f"off by {error:.1e} relative to float64"
                        continue
                    ways["called"][name] = Within(lambda name=name: form(name), made[what][0])
                    if recorded.on_gpu:
                        ways.setdefault("replayed", {})[name] = recorded
            for way, timed in ways.items():
                times = interleaved(timed, rounds)
                first = next(iter(times.values()), None)
                ratios = {name: seconds / first for name, seconds in times.items()}
                found = {"N": N, "what": what, "way": way, "first_seconds": first, "over_first": ratios}
                yield {**found, "wrong": wrong} if wrong else found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()
    where, results = machine(options.device), [*measure(options.device, options.rows, options.rounds)]
    names = list(dict.fromkeys(name for r in results for name in r["over_first"]))
    rows = [(r["N"], r["what"], r["way"], *(r["over_first"].get(name, "-") for name in names)) for r in results]
    show(f"Time over {names[0]}'s, d = 768, b = 24, bf16", where, ("N", "what", "way", *names), rows)
    write("small", where, results, options.output)
    if wrong := {f"{name}: {why}" for r in results for name, why in r.get("wrong", {}).items()}:
        raise SystemExit(f"wrong: {'; '.join(sorted(wrong))}")


if __name__ == "__main__":
    main()
