"""The checks of the ops' arguments. Implementations and fake kernels call the same ones, whatever the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layout import AdapterLayout, Folded, Saved, TensorSpec, accumulator_dtype

_INDEX_DTYPES = (torch.int32, torch.int64)


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    # torch._check_value supports a compiler's symbolic sizes. It is not called for a plain True, because it is slow: a
    # dozen calls took a third of the time of a small eager call.
    if condition is not True:
        torch._check_value(condition, message)


def _same_device(**tensors: Tensor) -> None:
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        _require(
            tensor.device == first.device,
            lambda: f"{name} must be on {first_name}'s device {first.device}, got {tensor.device}",
        )


def _floating(name: str, tensor: Tensor) -> None:
    _require(tensor.dtype.is_floating_point, lambda: f"{name} must be of a floating dtype, got {tensor.dtype}")


def check_generate(E: Tensor, G: Tensor, g0: Tensor) -> None:
    """Check the arguments of ``generate_weights``: E [Q, n, k], G [Q, P, k] and g0 [Q, P], of one floating dtype and on
    one device. ValueError otherwise."""
    for name, tensor, dims in (("E", E, "Q, n, k"), ("G", G, "Q, P, k"), ("g0", g0, "Q, P")):
        _require(tensor.dim() == dims.count(",") + 1, lambda: f"{name} must be [{dims}], got {list(tensor.shape)}")
        _require(tensor.dtype == E.dtype, lambda: f"{name} must have E's dtype {E.dtype}, got {tensor.dtype}")
    _floating("E", E)
    _same_device(E=E, G=G, g0=g0)
    _require(
        E.shape[0] == G.shape[0] and E.shape[2] == G.shape[2],
        lambda: f"E [Q, n, k] and G [Q, P, k] must agree in Q and k, got {list(E.shape)} and {list(G.shape)}",
    )
    _require(g0.shape == G.shape[:2], lambda: f"g0 must be [Q, P] = {list(G.shape[:2])} like G, got {list(g0.shape)}")


def check_fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> None:
    """Check the arguments of ``fold``: packed [..., P], and a compute dtype; both dtypes must be floating. ValueError
    otherwise."""
    _floating("packed", packed)
    _require(dtype.is_floating_point, lambda: f"dtype must be a floating dtype, got {dtype}")
    _require(packed.dim() >= 1, lambda: "packed must be [..., P], got a scalar")
    _require(
        packed.shape[-1] == layout.numel,
        lambda: f"packed must have P = {layout.numel} numbers per adapter for {layout}, got {packed.shape[-1]}",
    )


def check_adapter(
    x: Tensor,
    packed: Tensor,
    folded: Folded | None,
    layout: AdapterLayout,
    task_index: Tensor | None,
    g: Tensor | None = None,
    saved: Saved | None = None,
) -> None:
    """Check the arguments of ``adapter``, and with ``g`` and ``saved`` those of its backward, except for the values in
    ``task_index``. ValueError where they do not fit together."""
    _check_input(x, layout.d)
    _require(packed.dim() == 2, lambda: f"packed must be [T, P], got {list(packed.shape)}")
    check_fold(packed, layout, x.dtype)
    _same_device(x=x, packed=packed)
    T = packed.shape[0]
    if folded is not None:
        _same_device(x=x, wd=folded.wd)
        _check_table("folded", folded, _folded_table(layout, T, x.dtype, packed.dtype))
    _check_tasks(x, T, task_index)
    if g is not None:
        _require(g.shape == x.shape, lambda: f"g must have x's shape {list(x.shape)}, got {list(g.shape)}")
        _require(g.dtype == x.dtype, lambda: f"g must have x's dtype {x.dtype}, got {g.dtype}")
        _same_device(x=x, g=g)
    if saved is not None:
        _check_table("saved", saved, Saved.table(layout, x.shape[:-1], x.dtype))


def _folded_table(layout: AdapterLayout, T: int, dtype: torch.dtype, packed_dtype: torch.dtype) -> Sequence[TensorSpec]:
    # A compiler's symbolic T cannot be a key of the cache.
    table = _cached_folded_table if type(T) is int else _cached_folded_table.__wrapped__
    return table(layout, T, dtype, packed_dtype)


@functools.lru_cache(maxsize=256)
def _cached_folded_table(
    layout: AdapterLayout, T: int, dtype: torch.dtype, packed_dtype: torch.dtype
) -> Sequence[TensorSpec]:
    return Folded.table(layout, (T,), dtype, accumulator_dtype(dtype, packed_dtype))


def _check_table(what: str, tensors: Folded | Saved, table: Sequence[TensorSpec]) -> None:
    for name, tensor, (shape, dtype) in zip(tensors._fields, tensors, table):
        if tensor.shape != shape or tensor.dtype != dtype:
            _require(
                False,
                lambda: (
                    f"{what}.{name} must be {list(shape)} in {dtype} for this x and packed, "
                    f"got {list(tensor.shape)} in {tensor.dtype}"
                ),
            )


def check_hyper_adapter(
    x: Tensor, E: Tensor, G: Tensor, g0: Tensor, layout: AdapterLayout, task_index: Tensor | None
) -> None:
    """Check the arguments of ``hyper_adapter``: x as for ``adapter``, E [T, k], G [P, k] and g0 [P]. ValueError
    otherwise."""
    _check_input(x, layout.d)
    for name, tensor, dims in (("E", E, "T, k"), ("G", G, "P, k"), ("g0", g0, "P")):
        _require(tensor.dim() == dims.count(",") + 1, lambda: f"{name} must be [{dims}], got {list(tensor.shape)}")
    check_generate(E.unsqueeze(0), G.unsqueeze(0), g0.unsqueeze(0))
    _require(G.shape[0] == layout.numel, lambda: f"G must have P = {layout.numel} rows for {layout}, got {G.shape[0]}")
    _same_device(x=x, E=E)
    _check_tasks(x, E.shape[0], task_index)


def _check_input(x: Tensor, d: int) -> None:
    _floating("x", x)
    _require(x.dim() >= 1, lambda: "x must be [..., d], got a scalar")
    _require(x.shape[-1] == d, lambda: f"x must be [..., {d}], the adapter's width, got {list(x.shape)}")


def _check_tasks(x: Tensor, T: int, task_index: Tensor | None) -> None:
    if task_index is None:
        _require(T == 1, lambda: f"there are weights of T = {T} tasks: pass task_index, the task of each sample")
        return
    _require(task_index.dtype in _INDEX_DTYPES, lambda: f"task_index must be int32 or int64, got {task_index.dtype}")
    _require(x.dim() >= 2, lambda: f"x must be [B, ..., d] with task_index, got {list(x.shape)}")
    _require(task_index.dim() == 1, lambda: f"task_index must be [B], got {list(task_index.shape)}")
    _require(
        task_index.shape[0] == x.shape[0],
        lambda: f"task_index must have one entry per sample of x, {x.shape[0]}, got {task_index.shape[0]}",
    )
    _same_device(x=x, task_index=task_index)


def check_task_range(task_index: Tensor | None, T: int) -> None:
    """Check that the tasks are in -1 .. T-1. ValueError otherwise.

    A ``task_index`` on a GPU is not checked, because reading it would wait for the GPU.
    """
    if task_index is None or task_index.device.type != "cpu" or task_index.numel() == 0:
        return
    if is_batched(task_index):
        return
    low, high = (value.item() for value in torch.aminmax(task_index))
    if low < -1 or high >= T:
        raise ValueError(f"task_index must be from -1 (no adapter) to {T - 1}, got {low if low < -1 else high}")


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap has a batch of the tensor, at any level of transforms: it then has no single value to read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
