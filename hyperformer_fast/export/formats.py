"""The three formats of an exported graph: written, and run again to be compared.

Letters: B samples, L tokens of a source, P slots of the cache.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..extras import require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: A graph that was loaded: tensors in, tensors out.
Run = Callable[..., Sequence[Tensor]]

#: More bytes than these do not fit into one ONNX file, with room for the graph.
_MOST_ONNX_BYTES = 1_800_000_000


class Tensors(NamedTuple):
    """A graph's inputs or outputs: each one's name, and the letters of its dimensions."""

    shapes: dict[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        return list(self.shapes)


#: The dimensions that are open in an artifact.
DYNAMIC = {"B": "batch", "L": "source", "P": "slots"}

_CROSS = {"cross_keys": tuple("NBHLk"), "cross_values": tuple("NBHLk")}

#: Name of a graph -> its inputs, its outputs.
GRAPHS = {
    "encoder": (
        Tensors({"input_ids": ("B", "L"), "attention_mask": ("B", "L"), "task_index": ("B",)}),
        Tensors(_CROSS),
    ),
    "decoder": (
        Tensors(
            {
                "token": ("B",),
                "position": ("B",),
                "attention_mask": ("B", "L"),
                "task_index": ("B",),
                "keys": tuple("NBHPk"),
                "values": tuple("NBHPk"),
                **_CROSS,
            }
        ),
        Tensors({"logits": ("B", "V"), "new_keys": tuple("NBHk"), "new_values": tuple("NBHk")}),
    ),
}


class Format(NamedTuple):
    """How a graph is written and run.

    Args:
        suffix: of its file.
        write: writes an exported program to a path. Its third argument is the graph's name.
        load: makes a file runnable.
        packages: import names of packages that it needs beside PyTorch.
    """

    suffix: str
    write: Callable[[ExportedProgram, Path, str], None]
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()


def trace(module: nn.Module, name: str, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Trace a graph with ``inputs``, no dimension of which may be 1, for any batch, source and number of slots."""
    dimensions = {letter: torch.export.Dim(of, min=1) for letter, of in DYNAMIC.items()}
    given, _ = GRAPHS[name]
    shapes = {
        each: {i: dimensions[letter] for i, letter in enumerate(letters) if letter in dimensions}
        for each, letters in given.shapes.items()
    }
    with torch.no_grad():
        return torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)


def expect_packages(name: str) -> None:
    """Raise :class:`~hyperformer_fast.extras.MissingPackage` where a format needs a package that is not installed."""
    require(f"export to {name}", *FORMATS[name].packages, extra="export")


def _write_torch(program: ExportedProgram, path: Path, name: str) -> None:
    torch.export.save(program, path)


def _load_torch(path: Path) -> Run:
    loaded: Run = torch.export.load(path).module()
    return loaded


def _write_onnx(program: ExportedProgram, path: Path, name: str) -> None:
    inputs, outputs = GRAPHS[name]
    nbytes = sum(tensor.nbytes for tensor in (*program.state_dict.values(), *program.constants.values()))
    with _silent():
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            input_names=inputs.names,
            output_names=outputs.names,
            external_data=nbytes > _MOST_ONNX_BYTES,
            verbose=False,
        )


def _load_onnx(path: Path) -> Run:
    onnxruntime: Any = importlib.import_module("onnxruntime")  # type checkers need not have it
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        return [torch.from_numpy(each) for each in found]

    return run


def _write_aoti(program: ExportedProgram, path: Path, name: str) -> None:
    with _silent():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load_aoti(path: Path) -> Run:
    loaded: Run = torch._inductor.aoti_load_package(str(path))
    return loaded


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hold back what exporters print and log of their progress. Their errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


FORMATS = {
    "torch": Format(".pt2", _write_torch, _load_torch),
    "onnx": Format(".onnx", _write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "aoti": Format(".pt2", _write_aoti, _load_aoti),
}
