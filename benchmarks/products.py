"""Time products with frozen weights by MKL and by oneDNN, and compare both with float64.

python benchmarks/products.py [--rounds 15] [--quick] [--output DIR]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import arguments, interleaved, machine, relative_error, show, write

from hyperformer_fast.ops import products

#: Rows, width of the input, width of the output: a T5-small's products in training and in decoding, and a T5-base's.
SHAPES = (
    (2048, 512, 512), (2048, 512, 2048), (2048, 2048, 512), (1024, 768, 3072), (128, 512, 32128),
    (1, 512, 512), (1, 512, 32128), (8, 512, 512),
)  # fmt: skip


def compared(N: int, K: int, M: int, rounds: int) -> dict[str, dict[str, float]]:
    """The product x [N, K] by a weight [M, K], and the product that is its gradient: what oneDNN takes and loses."""
    torch.manual_seed(0)
    x, weight, g = torch.randn(N, K), torch.randn(M, K), torch.randn(N, M)
    forms = {
        "product": (lambda: F.linear(x, weight), lambda: products._onednn(x, weight), x.double() @ weight.double().t()),
        "gradient": (lambda: g @ weight, lambda: products._onednn(g, weight.t()), g.double() @ weight.double()),
    }
    found = {}
    for name, (mkl, onednn, truth) in forms.items():
        times = interleaved({"mkl": mkl, "onednn": onednn}, rounds)
        errors = relative_error(mkl(), truth), relative_error(onednn(), truth)
        found[name] = {"mkl_over_onednn": times["mkl"] / times["onednn"], "error_over_mkls": errors[1] / errors[0]}
    return found


def main() -> None:
    options = arguments(__doc__, quick="two small shapes, one round").parse_args()
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise SystemExit("this PyTorch has no oneDNN, or another interface to it")
    shapes = ((8, 32, 16), (1, 32, 16)) if options.quick else SHAPES
    results = {
        f"{N} x {K} by {K} x {M}": compared(N, K, M, 1 if options.quick else options.rounds) for N, K, M in shapes
    }
    reason = products.why_not()
    print(f"oneDNN is not taken on this machine, because {reason}" if reason else "oneDNN is taken on this machine")
    where = machine()
    rows = [(shape, name, *of.values()) for shape, found in results.items() for name, of in found.items()]
    show("Products in float32", where, ("", "", "time of MKL over oneDNN's", "error of oneDNN over MKL's"), rows)
    write("products", where, results, options.output)


if __name__ == "__main__":
    main()
