"""How one adapter's generated parameters lie in one vector."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

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
        slices, start = {}, 0
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

    def unpack(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of ``packed`` [..., P] as views [..., *shape]. ValueError where the last dimension is not P."""
        if packed.shape[-1] != self.numel:
            raise ValueError(f"packed must have {self.numel} numbers per adapter for {self}, got {packed.shape[-1]}")
        return {name: packed[..., self.slices[name]].unflatten(-1, shape) for name, shape in self.shapes.items()}

    def pack(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
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
