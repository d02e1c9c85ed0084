"""Tell whether two T5s have the same frozen weights, from digests of all their values, even in different precisions.

A base model may be saved in float32 and loaded in bfloat16. A record therefore has, for each weight, the digest of its
values and the digests of its values rounded to each narrower precision. Two weights are the same if their digests agree
in a precision that is the own precision of at least one of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from transformers import T5Config

#: Name -> weight. None stands for an opaque weight, whose values cannot be read as numbers: quantised or not in memory.
Weights = dict[str, Tensor | None]

#: Name -> "precision:digest precision:digest ...", the weight's own precision first; empty for a weight that is None.
Record = dict[str, str]

_NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}
# Modules that may share one weight, which has the name of the first of them. Quantising any of them unties it.
_MAY_BE_TIED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")

_ENTRY = re.compile(r"(?:[a-z0-9_]+:[0-9a-f]{16}(?: |$))*")
_CHUNK = 1 << 18  # numbers per chunk, so that the rounded values are still in the cache when they are hashed
_SHOW_PROGRESS = 10**9  # show a progress bar from this number of bytes, which take about half a second

# A sample has one number from the middle of each weight. Rounding to bfloat16 changes it by a factor of at most 2^-9,
# whereas another model's number is unrelated. float16 rounds values below the absolute tolerance to (almost) zero.
_RTOL, _ATOL = 1e-2, 1e-6

#: A cache: parameter -> (its state when it was read, {(precision, precision it was rounded to first): digest}).
_known = WeakTensorKeyDictionary()


def frozen(t5: nn.Module, trained: Iterable[str]) -> Weights:
    """Return the T5's weights except the ``trained`` ones, sorted by name."""
    trained = set(trained)
    found: Weights = {name: p if is_plain(p) else None for name, p in t5.named_parameters() if name not in trained}
    for path, module in t5.named_modules():
        if hides_its_weight(module):
            found[f"{path}.weight"] = None
    return dict(sorted(found.items()))


def config_of(t5: nn.Module) -> T5Config:
    """Return the configuration of a T5 of any class, which ``nn.Module`` does not declare."""
    return cast("T5Config", t5.config)


def hides_its_weight(module: nn.Module) -> bool:
    """Return whether a module has a weight that is not a parameter: torch's quantised linears have a method of that
    name, other quantisers keep it in buffers."""
    if callable(getattr(module, "weight", None)):
        return True
    has_parts = any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
    # An observer or a counter has buffers, too, but no matrix among them.
    return not has_parts and any(buffer.dim() > 1 for buffer in module.buffers(recurse=False))


def is_plain(parameter: Tensor) -> bool:
    """Return whether a parameter's values can be read as numbers: it is not quantised, and it is in memory."""
    dense = type(parameter.data) is Tensor and parameter.layout == torch.strided and not parameter.is_meta
    return dense and parameter.is_floating_point()


def sample(weights: Weights) -> Tensor:
    """Return one number from the middle of each weight (NaN for None): a cheap way to recognise another T5."""
    numbers = [
        torch.tensor(torch.nan) if w is None else w.detach().flatten()[w.numel() // 2].float().cpu()
        for w in weights.values()
    ]
    return torch.stack(numbers) if numbers else torch.empty(0)


def record(weights: Weights) -> Record:
    """Return the digests of all weights, for a checkpoint."""
    plain = {name: w for name, w in weights.items() if w is not None}
    wanted = {name: [w.dtype, *_NARROWER.get(w.dtype, ())] for name, w in plain.items()}
    _read((w, [(precision, None) for precision in wanted[name]]) for name, w in plain.items())
    entry = lambda name: " ".join(  # noqa: E731
        f"{_spelling(precision)}:{_digest_of(plain[name], precision)}" for precision in wanted.get(name, ())
    )
    return {name: entry(name) for name in weights}


def is_record(value: object) -> bool:
    """Return whether ``value``, read from a file, is a :data:`Record`."""
    return isinstance(value, dict) and all(isinstance(e, str) and _ENTRY.fullmatch(e) for e in value.values())


def difference(weights: Weights, theirs: Tensor, digests: Record | None) -> tuple[str | None, list[str]]:
    """Compare a T5's frozen weights with those of the T5 that a checkpoint was trained on.

    Args:
        weights: the frozen weights, as :func:`frozen` returns them.
        theirs: the checkpoint's :func:`sample`.
        digests: the checkpoint's :func:`record`; None for an old file, which has only a sample.

    Returns:
        A description of the first difference, or None; and the names of weights that could not be compared value by
        value.
    """
    opaque = {name for name, weight in weights.items() if weight is None}
    if digests is None:
        # An old file has the number of weights, and not their names. Quantising may have untied some, which then have
        # no counterpart in it.
        if len(weights) != len(theirs):
            weights = {name: w for name, w in weights.items() if not (name in opaque and _may_be_tied(name))}
        names = list(weights)
    else:
        names = sorted(digests)
        other = _missing_elsewhere(weights.keys(), opaque, digests)
        if other is not None:
            return f"{other} is frozen in one of the two only", []
    if len(names) != len(theirs):
        return f"it had {len(theirs)} frozen parameters, this one has {len(weights)}", []
    for name, number in zip(names, theirs.tolist(), strict=True):
        weight = weights.get(name)
        if weight is None or (digests is not None and not digests[name]):
            continue
        ours = sample({name: weight})
        if not torch.isclose(ours, torch.tensor([number]), rtol=_RTOL, atol=_ATOL, equal_nan=True):
            return f"its frozen {name} has {number:.6g} where this one's has {ours.item():.6g}", []
    if digests is None:
        return None, sorted(opaque)
    alone = weights.keys() ^ digests.keys()
    differs, unread = _difference_of_digests({n: w for n, w in weights.items() if n not in alone}, digests)
    return differs, sorted({*unread, *alone}) if differs is None else []


def summary(weights: Weights) -> dict[str, str]:
    """Return the digest of all weights together in each precision, where :func:`record` has one for each weight.

    It is empty where a weight is opaque or not all weights have one precision, because it would agree with nothing.
    """
    own = {weight.dtype if weight is not None else None for weight in weights.values()}
    precision = own.pop() if len(own) == 1 else None
    if precision is None:
        return {}
    return {_spelling(p): _digest_of_all(weights, p) for p in (precision, *_NARROWER.get(precision, ()))}


def differs_from_summary(weights: Weights, said: Mapping[str, str]) -> bool | None:
    """Return whether a T5's weights are others than those of a :func:`summary`; None where they cannot be compared.

    As in :func:`difference`, they are the same if they agree in the own precision of one side, or if one side is the
    other one rounded to a narrower precision and widened again.
    """
    ours = summary(weights)
    if not ours or not said:
        return None
    (mine, *_), (theirs, *_) = ours, said
    shared = theirs if theirs in ours else mine if mine in said else None
    if shared is None:  # bfloat16 and float16
        return None
    if ours[shared] == said[shared]:
        return False
    own = next(weight.dtype for weight in weights.values() if weight is not None)
    for narrow in _NARROWER.get(own, ()):
        if mine == theirs and said.get(_spelling(narrow)) == ours[_spelling(narrow)]:
            if _digest_of_all(weights, own, narrow) in (ours[mine], said[mine]):
                return False
    return True


def _digest_of_all(weights: Weights, precision: torch.dtype, through: torch.dtype | None = None) -> str:
    plain = {name: weight for name, weight in weights.items() if weight is not None}
    _read((weight, [(precision, through)]) for weight in plain.values())
    sha = hashlib.sha256()
    for name, weight in plain.items():
        sha.update(f"{name} {_digest_of(weight, precision, through)}\n".encode())
    return sha.hexdigest()


def _missing_elsewhere(ours: Set[str], opaque: Set[str], digests: Record) -> str | None:
    """Return the first name that only one of two T5s has and that quantising the other does not explain; or None.

    A quantiser may give a module's weight another name (``W_q``), and a tied module a weight of its own.
    """
    theirs_opaque = {name for name, entry in digests.items() if not entry}
    for here, here_opaque, there, there_opaque in (
        (ours, opaque, digests.keys(), theirs_opaque),
        (digests.keys(), theirs_opaque, ours, opaque),
    ):
        modules, opaque_modules = set(map(_module_of, there)), set(map(_module_of, there_opaque))
        for name in sorted(here - there):
            renamed = _module_of(name) in (modules if name in here_opaque else opaque_modules)
            untied = _may_be_tied(name) and any(map(_may_be_tied, here_opaque))
            if not renamed and not untied:
                return name
    return None


def _may_be_tied(name: str) -> bool:
    return _module_of(name) in _MAY_BE_TIED


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _difference_of_digests(weights: Weights, digests: Record) -> tuple[str | None, list[str]]:
    said = {name: dict(part.split(":") for part in entry.split()) for name, entry in digests.items()}
    plain = {name: weight for name, weight in weights.items() if weight is not None}
    found = {name: _shared_precision(weight, said[name]) for name, weight in plain.items()}
    shared = {name: precision for name, precision in found.items() if precision is not None}
    _read((plain[name], [(precision, None)]) for name, precision in shared.items())
    for name, precision in shared.items():
        if _digest_of(plain[name], precision) == said[name][_spelling(precision)]:
            continue
        if not _is_rounding(plain[name], said[name]):
            return f"its frozen {name} has other values than this one's", []
    return None, [name for name in weights if name not in shared]


def _shared_precision(weight: Tensor, said: Mapping[str, str]) -> torch.dtype | None:
    """Return the precision in which both sides have a digest and that is one side's own, or None."""
    for precision in (weight.dtype, *_NARROWER.get(weight.dtype, ())):
        own = next(iter(said), None) == _spelling(precision)
        if _spelling(precision) in said and (own or precision == weight.dtype):
            return precision
    return None


def _is_rounding(weight: Tensor, said: Mapping[str, str]) -> bool:
    """Return whether one side equals the other, rounded to a narrower precision and widened again."""
    for narrow in _NARROWER.get(weight.dtype, ()):
        if said.get(_spelling(narrow)) != _digest_of(weight, narrow):
            continue
        rounded = _digest_of(weight, weight.dtype, narrow)
        if rounded in (_digest_of(weight, weight.dtype), said.get(_spelling(weight.dtype))):
            return True
    return False


def _digest_of(weight: Tensor, precision: torch.dtype, through: torch.dtype | None = None) -> str:
    """Return the digest of ``weight`` in ``precision``, after rounding it to ``through`` if that is given."""
    _read([(weight, [(precision, through)])])
    digest: str = _known[weight][1][precision, through]
    return digest


def _read(wanted: Iterable[tuple[Tensor, list[tuple[torch.dtype, torch.dtype | None]]]]) -> None:
    """Compute the digests that are not cached yet, for several weights in parallel."""
    missing = []
    for weight, ways in wanted:
        state = _state(weight)
        if weight not in _known or _known[weight][0] != state:
            _known[weight] = (state, {})
        missing += [(weight, way) for way in ways if way not in _known[weight][1]]
    if not missing:
        return
    total = sum(weight.numel() * weight.element_size() for weight, _ in missing)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, _progress(total) as bar:
        jobs = [(weight, way, pool.submit(_compute, weight.detach(), *way)) for weight, way in missing]
        for weight, way, job in jobs:
            _known[weight][1][way] = job.result()
            bar.update(weight.numel() * weight.element_size())


def _progress(total: int) -> Any:
    from transformers.utils import logging  # respects whether the user has disabled transformers' progress bars

    quiet = True if total < _SHOW_PROGRESS else None  # None: only on a terminal
    return logging.tqdm(desc="reading the T5's weights", total=total, unit="B", unit_scale=True, disable=quiet)


def _compute(weight: Tensor, precision: torch.dtype, through: torch.dtype | None) -> str:
    sha = hashlib.sha256(f"{list(weight.shape)} {precision}".encode())
    for chunk in weight.reshape(-1).split(_CHUNK):
        chunk = chunk.to(precision) if through is None else chunk.to(through).to(precision)
        sha.update(chunk.cpu().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _state(weight: Tensor) -> tuple[int | None, int, torch.dtype, bytes]:
    """Return a state that changes with a weight's values.

    It includes a hash of each row, because writing through ``.data`` does not change the version. The hashes take a
    tenth of the time of a digest.
    """
    version = None if weight.is_inference() else weight._version
    values = weight.detach()
    if not values.numel():
        return version, weight.data_ptr(), weight.dtype, b""
    rows = torch.hash_tensor(values.reshape(len(values) if values.dim() else 1, -1), dim=1)
    return version, weight.data_ptr(), weight.dtype, hashlib.sha256(rows.cpu().numpy().tobytes()).digest()


def _spelling(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
