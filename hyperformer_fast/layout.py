"""What travels together between the ops and the kernels: an adapter's layout, its folded weights, its saved tensors.

The shapes and dtypes stand here once. The kernels that allocate, the fake kernels, the checks and the tests read them
from here.

Letters: d width, b bottleneck, T tasks, P packed numbers per adapter, V the length of ``Folded.vectors``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import ACTIVATIONS

#: Epsilon of the adapters' layer norms: torch.nn.functional.layer_norm's default, which the authors' code uses.
EPS = 1e-5

PARTS = ("down_weight", "down_bias", "up_weight", "up_bias", "post_gamma", "post_beta", "pre_gamma", "pre_beta")


@dataclasses.dataclass(frozen=True)
class AdapterLayout:
    """Names, shapes and offsets of the parts of a packed adapter, always in the order of ``PARTS``.

    The order of the parts, and row-major matrices, are those of the authors' generators, so that an official
    generator's rows are ours. Norm parts are there only where their norm is on: P = 2db + b + d, + 2d for each norm.

    Args:
        d: width of the adapted stream.
        b: bottleneck.
        pre_norm, post_norm: whether the norm before / after the adapter is on.
    """

    d: int
    b: int
    pre_norm: bool = False
    post_norm: bool = True

    @property
    def arguments(self) -> tuple[int, int, bool, bool]:
        """The layout as the arguments of a registered op (``LAYOUT_SCHEMA``)."""
        return self.d, self.b, self.pre_norm, self.post_norm

    @classmethod
    def from_arguments(cls, d: int, b: int, pre_norm: bool, post_norm: bool) -> AdapterLayout:
        """The inverse of :attr:`arguments`; equal arguments give the same object, with its cached properties."""
        return _layout_of(d, b, pre_norm, post_norm)

    def __post_init__(self) -> None:
        for name in ("d", "b"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part, in order."""
        d, b = self.d, self.b
        shapes: dict[str, tuple[int, ...]] = {
            "down_weight": (b, d),
            "down_bias": (b,),
            "up_weight": (d, b),
            "up_bias": (d,),
        }
        if self.post_norm:
            shapes |= {"post_gamma": (d,), "post_beta": (d,)}
        if self.pre_norm:
            shapes |= {"pre_gamma": (d,), "pre_beta": (d,)}
        return shapes

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """Where each part lies in the vector."""
        slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            slices[name] = slice(start, start + math.prod(shape))
            start = slices[name].stop
        return slices

    @functools.cached_property
    def numel(self) -> int:
        """P, the length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @functools.cached_property
    def norm_numel(self) -> int:
        """How many of the last numbers belong to the norms."""
        return 2 * self.d * (self.pre_norm + self.post_norm)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The parts of ``packed`` [..., P] as views [..., *shape]. ValueError where the last dimension is not P."""
        if packed.shape[-1] != self.numel:
            raise ValueError(f"packed must have {self.numel} numbers per adapter for {self}, got {packed.shape[-1]}")
        return {name: packed[..., self.slices[name]].unflatten(-1, shape) for name, shape in self.shapes.items()}

    def pack(self, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of :meth:`unpack`, as a new tensor [..., P]. ValueError names a missing or misshapen part."""
        vectors = []
        for name, shape in self.shapes.items():
            if name not in parts:
                raise ValueError(f"part {name} is missing; {self} needs {', '.join(self.shapes)}")
            part = parts[name]
            if tuple(part.shape[part.dim() - len(shape) :]) != shape:
                raise ValueError(f"{name} must be [..., {', '.join(map(str, shape))}], got {list(part.shape)}")
            vectors.append(part.flatten(part.dim() - len(shape)))
        return torch.cat(vectors, -1)


_layout_of = functools.lru_cache(maxsize=256)(AdapterLayout)

#: The arguments of a registered op that carry a layout, and those that carry a spec.
LAYOUT_SCHEMA = "int d, int b, bool pre_norm, bool post_norm"
SPEC_SCHEMA = f"{LAYOUT_SCHEMA}, int activation"


class AdapterSpec(NamedTuple):
    """Everything static that an adapter's kernels are told.

    A new constant of the adapter is a field here, and an entry in ``SPEC_SCHEMA`` and in the two members below.
    """

    layout: AdapterLayout
    activation: str  #: canonical name

    @property
    def arguments(self) -> tuple[int, int, bool, bool, int]:
        """The spec as the arguments of a registered op (``SPEC_SCHEMA``)."""
        return *self.layout.arguments, ACTIVATIONS.index(self.activation)

    @classmethod
    def from_arguments(cls, d: int, b: int, pre_norm: bool, post_norm: bool, activation: int) -> AdapterSpec:
        """The inverse of :attr:`arguments`."""
        return cls(_layout_of(d, b, pre_norm, post_norm), ACTIVATIONS[activation])


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of these dtypes: float64 where any of them is float64, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class TensorSpec(NamedTuple):
    """The shape and dtype of one tensor."""

    shape: Sequence[int]
    dtype: torch.dtype

    def empty(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape and dtype on the device of ``like``."""
        return like.new_empty(self.shape, dtype=self.dtype)


#: Where each tensor in a buffer starts, in bytes: kernels load 16 bytes at a time.
_BUFFER_ALIGNMENT = 16


def buffer_numel(table: Sequence[TensorSpec], dtype: torch.dtype) -> int:
    """How many numbers of ``dtype`` the buffer has from which :func:`in_buffer` takes tensors."""
    return -(-sum(map(_buffer_bytes, table)) // dtype.itemsize)


def in_buffer(buffer: Tensor, table: Sequence[TensorSpec]) -> list[Tensor]:
    """The tensors of ``table`` as views of ``buffer`` [``buffer_numel``]. One allocation serves them all."""
    views, start = [], 0
    for spec in table:
        numel = math.prod(spec.shape)
        part = buffer.view(torch.uint8)[start : start + numel * spec.dtype.itemsize]
        views.append(part.view(spec.dtype).view(spec.shape))
        start += _buffer_bytes(spec)
    return views


def _buffer_bytes(spec: TensorSpec) -> int:
    return -(-math.prod(spec.shape) * spec.dtype.itemsize // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT


class Folded(NamedTuple):
    """What a forward reads of an adapter's weights, made once per step by ``ops.fold`` (docs/design.md). The leading
    dimensions are those of ``packed``.

    ``wd`` and ``wg`` have the compute dtype; the others are float32 (float64 in float64). V is b + 2d with a post-norm,
    b + d without.
    """

    wd: Tensor  #: [..., b, d] down-projection, times the pre-norm's gamma
    wg: Tensor  #: [..., b, d] up-projection transposed; with a post-norm centred, times gamma, divided by ``scale``
    #: [..., V] down bias (with the pre-norm's beta) [b]; gamma * (up bias - mean), or the up bias [d]; beta [d]
    vectors: Tensor
    scale: Tensor  #: [..., b] powers of two, one per row of ``wg``; empty without post-norm
    root: Tensor  #: [..., b+1, b+1] R, upper triangular, R^T R = Wa^T Wa / d; empty without post-norm
    mean: Tensor  #: [..., b+1] column means of [W_u | b_u]; empty without post-norm

    @staticmethod
    def table(
        layout: AdapterLayout, lead: Sequence[int], dtype: torch.dtype, exact: torch.dtype | None = None
    ) -> list[TensorSpec]:
        """Shape and dtype of each field, in order.

        Args:
            lead: the leading dimensions.
            dtype: the compute dtype.
            exact: the dtype of the other fields; by default the accumulator's of ``dtype``.
        """
        d, b = layout.d, layout.b
        exact = exact or accumulator_dtype(dtype)
        scales, columns, vectors = (b, b + 1, b + 2 * d) if layout.post_norm else (0, 0, b + d)
        tails = ((b, d), (b, d), (vectors,), (scales,), (columns, columns), (columns,))
        return [TensorSpec((*lead, *tail), dtype if i < 2 else exact) for i, tail in enumerate(tails)]


class Saved(NamedTuple):
    """What an adapter's forward keeps for its backward, beside x. Absent ones are empty."""

    z: Tensor  #: [..., b] bottleneck before the activation, in x's dtype
    r: Tensor  #: [...] reciprocal standard deviation of the post-norm
    pre_mean: Tensor  #: [...] row mean of x, with a pre-norm
    pre_rstd: Tensor  #: [...] row reciprocal standard deviation of x, with a pre-norm

    @staticmethod
    def table(layout: AdapterLayout, lead: Sequence[int], dtype: torch.dtype, save: bool = True) -> list[TensorSpec]:
        """Shape and dtype of each field, in order.

        Args:
            lead: the dimensions of x before its last.
            dtype: x's.
            save: False: nothing is kept, and every field is empty.
        """
        exact = accumulator_dtype(dtype)
        statistics = (layout.post_norm, layout.pre_norm, layout.pre_norm)
        return [
            TensorSpec((*lead, layout.b) if save else (0,), dtype),
            *(TensorSpec(tuple(lead) if save and kept else (0,), exact) for kept in statistics),
        ]

    @classmethod
    def empty(cls, like: Tensor, layout: AdapterLayout, save: bool = True) -> Saved:
        """Uninitialised, for x = ``like``."""
        return cls(*(spec.empty(like) for spec in cls.table(layout, like.shape[:-1], like.dtype, save)))


#: The arguments of a registered op that carry a dropout.
DROPOUT_SCHEMA = "float p, Tensor? seed, int stream"


class Dropout(NamedTuple):
    """One dropout: which elements it drops follows from these three alone (philox.py), so no mask is stored.

    Make one with ``philox.draw``, or use ``NO_DROPOUT``.
    """

    p: float  #: the probability of dropping an element; it is rounded to a multiple of 1/65536
    seed: Tensor | None  #: int64 [1] on the device of the tensors; None where p is 0
    stream: int  #: separates processes that have the same seed: it is the rank in torch.distributed


NO_DROPOUT = Dropout(0.0, None, 0)


def normed_dtype(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The dtype of T5's layer norm of an x: that of the weight if it is half precision, the accumulator's otherwise."""
    return weight if weight in (torch.float16, torch.bfloat16) else accumulator_dtype(x, weight)
