"""Time few rows, as in decoding, and whole sites: our backends, and every form of the CUDA library's kernels.

    python benchmarks/small.py [--device cuda] [--rows 1 8 64 256 1024 4096] [--rounds 15] [--output DIR]

"forward" applies folded weights; "site" generates, folds and applies. Each row belongs to another task than the one
before it. On a GPU every call is also replayed from a CUDA graph, which leaves out the host's time. Ratios are over the
first backend's time; every result is checked against float64 before it is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from providers import ACTIVATION, Case
from timing import arguments, interleaved, machine, relative_error, show, write
from torch import Tensor

from hyperformer_fast import backends, ops, reference
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


def replayed(call: Callable[[], Tensor]) -> Callable[[], object]:
    """``call`` as a replay of a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def calls_of(case: Case) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """The calls by what they do ("forward", "site") and by form, each checked against float64."""
    generator = torch.Generator().manual_seed(0)
    numel = case.layout.numel
    E, G = (torch.randn(n, EMBEDDING, generator=generator).to(case.device) for n in (T, numel))
    G, g0, index = 0.01 * G, case.packed[0], torch.arange(case.N, device=case.device) % T
    made: dict[str, dict[str, Callable[[], Tensor]]] = {"forward": {}, "site": {}}
    for backend in ours(case.device):
        with backends.use_backend(backend):
            packed = ops.generate_weights(E[None], G[None], g0[None])[0]
            folded = ops.fold(packed, case.layout, case.dtype)

        def forward(packed=packed, folded=folded) -> Tensor:
            return ops.adapter(case.x, packed, case.layout, ACTIVATION, folded, index)

        def site() -> Tensor:
            return ops.hyper_adapter(case.x, E, G, g0, case.layout, ACTIVATION, index)

        for name in FORMS if backend == "cuda" else [backend]:
            for what, call in (("forward", forward), ("site", site)):
                if what == "forward" and name.endswith("one launch"):
                    continue  # the forward alone is the same as with three launches

                def forced(name=name, call=call) -> Tensor:
                    with form(name):
                        return call()

                made[what][name] = forced
    exact = (t.double() for t in (E, G, g0))
    packed = reference.generate_weights(*(t.unsqueeze(0) for t in exact))[0]
    truth = reference.adapter(case.x.double(), packed, case.layout, ACTIVATION, index)
    for what, calls in made.items():
        for name, call in calls.items():
            error = relative_error(call(), truth)
            if not error <= 16 * torch.finfo(case.dtype).eps:
                raise RuntimeError(f"{what} by {name} is off by {error:.1e} relative to float64")
    return made


@torch.no_grad()
def measure(device: str, rows: list[int], rounds: int) -> list[dict]:
    """For each N and each thing done: the first backend's seconds, and the ratio of every form over them."""
    found = []
    for N in rows:
        for what, calls in calls_of(Case(N, 768, 24, torch.bfloat16, device)).items():
            ways = {"called": calls}
            if device.startswith("cuda"):
                ways["replayed"] = {name: replayed(call) for name, call in calls.items()}
            for way, timed in ways.items():
                times = interleaved(timed, rounds)
                first = next(iter(times.values()))
                ratios = {name: seconds / first for name, seconds in times.items()}
                found.append({"N": N, "what": what, "way": way, "first_seconds": first, "over_first": ratios})
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()
    where, results = machine(options.device), measure(options.device, options.rows, options.rounds)
    names = list(dict.fromkeys(name for r in results for name in r["over_first"]))
    rows = [(r["N"], r["what"], r["way"], *(r["over_first"].get(name, "-") for name in names)) for r in results]
    show(f"Time over {names[0]}'s, d = 768, b = 24, bf16", where, ("N", "what", "way", *names), rows)
    write("small", where, results, options.output)


if __name__ == "__main__":
    main()
