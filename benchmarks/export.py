"""Exported graphs beside the model: bytes, seconds to export and to load, and milliseconds per token of a greedy batch.

    python benchmarks/export.py [--size T5-small] [--formats torch onnx aoti] [--batches 1 8 64] [--rounds 9]

A T5 with random weights, HyperFormer++ with eight tasks, each sample of another one than the sample before it, sources
of 32 tokens. "bare T5" and "model" are transformers' `generate` without and with adapters, the others are the loop of
examples/export_decode.py; all write the same number of tokens. Ratios are over the bare T5's time. What is timed was
compared with the model when it was exported. A format whose packages are absent is named and left out.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_models import frozen_t5
from timing import arguments, interleaved, machine, show, write

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.export import export_model
from hyperformer_fast.export.formats import FORMATS, expect_packages
from hyperformer_fast.extras import MissingPackage
from hyperformer_fast.parameters import GLUE

SOURCE = 32


def example() -> Any:
    """The module examples/export_decode.py."""
    path = Path(__file__).resolve().parents[1] / "examples" / "export_decode.py"
    spec = importlib.util.spec_from_file_location("export_decode", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 1000, (samples, SOURCE), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def exported(model: Any, format: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """(what was measured of the files, a function from a batch and its tasks to tokens)."""
    start = time.perf_counter()
    description = export_model(model, folder, format)
    exporting = time.perf_counter() - start
    # No token ends a text, so that each batch writes as many tokens as it may.
    start = time.perf_counter()
    _, encoder, decoder = example().load(folder)
    loading = time.perf_counter() - start
    description["eos_token_id"] = -1
    size = sum(each["bytes"] for each in description["files"].values())
    figures = {
        "format": format, "bytes": size, "exporting": exporting, "loading": loading,
        "largest difference": description["largest_difference"],
    }  # fmt: skip

    def decode(batch: dict[str, torch.Tensor], tasks: list[str], tokens: int) -> np.ndarray:
        given = [each.numpy() for each in batch.values()]
        return example_decode(description, encoder, decoder, *given, tasks, tokens)

    example_decode = example().decode
    return figures, decode


def measure(size: str, layers: int, formats: list[str], batches: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of each format's files, and the milliseconds per token of each batch."""
    t5 = frozen_t5(size, layers, 32_128, 0.0, True, "cpu", torch.float32).eval()
    config = HyperFormerConfig(tasks=list(GLUE))
    model = get_hyperformer_model(copy.deepcopy(t5), config).eval()
    figures, decoders = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for format in formats:
            try:
                expect_packages(format)
            except MissingPackage as error:
                print(error)
                continue
            found, decoders[format] = exported(model, format, Path(folder) / format)
            figures.append(found)
            print(f"{format}: exported and compared in {found['exporting']:.0f} s", flush=True)
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        times = {}
        for samples in batches:
            batch, tasks = sources(samples), [GLUE[i % len(GLUE)] for i in range(samples)]
            calls: dict[str, Any] = {
                "bare T5": lambda: t5.generate(**batch, **options),
                "model": lambda: model.generate(**batch, task=tasks, **options),
            }
            for format, decode in decoders.items():
                calls[format] = lambda decode=decode: decode(batch, tasks, tokens)
            seconds = interleaved(calls, rounds)
            times[str(samples)] = {name: 1e3 * each / tokens for name, each in seconds.items()}
    return {"files": figures, "milliseconds per token": times}


def main() -> None:
    parser = arguments(
        __doc__ or "", rounds=9, quick="one block, one batch and the format torch alone, to try the script"
    )
    parser.add_argument("--size", default="T5-small", choices=("T5-small", "T5-base"), help="default: T5-small")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), help="default: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="B", help="default: 1 8 64")
    parser.add_argument("--tokens", type=int, default=20, help="tokens to write (default: 20)")
    options = parser.parse_args()
    layers = 6 if options.size == "T5-small" else 12
    if options.quick:
        layers, options.formats, options.batches, options.rounds, options.tokens = 1, ["torch"], [2], 1, 2
    where = machine()
    found = measure(options.size, layers, options.formats, options.batches, options.tokens, options.rounds)
    rows = [
        (
            each["format"], f"{each['bytes'] / 1e6:.1f} MB", f"{each['exporting']:.1f} s", f"{each['loading']:.2f} s",
            f"{each['largest difference']:.1e}",
        )
        for each in found["files"]
    ]  # fmt: skip
    columns = ("format", "files", "export", "load", "largest difference of logits")
    show(f"{options.size}, eight tasks", where, columns, rows)
    per_token = found["milliseconds per token"]
    columns = ("batch", *next(iter(per_token.values())))
    lines = [
        (samples, *(f"{each:.2f} ms, {each / times['bare T5']:.2f}x" for each in times.values()))
        for samples, times in per_token.items()
    ]
    show(f"{options.size}, per token of a greedy batch, sources of {SOURCE} tokens", where, columns, lines)
    write(f"export-{options.size.lower()}", where, found, options.output)


if __name__ == "__main__":
    main()
