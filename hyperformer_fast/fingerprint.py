"""Tell one T5 from another by all values of its frozen weights, in whichever precision each of them is held.

A base model may be saved in float32 and loaded in bfloat16, so a record holds, for each weight, the digest of its own
values and of those that it rounds to in the narrower precisions. Two weights are the same where they agree in a
precision in which at least one of the two holds all it has.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: Name -> weight; None for one whose values cannot be read as numbers (quantised, or not in memory).
Weights = dict[str, Tensor | None]

#: Name -> "precision:digest precision:digest ...", the weight's own precision first; empty where it had no values.
Record = dict[str, str]

_NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}
_ENTRY = re.compile(r"(?:[a-z0-9_]+:[0-9a-f]{16}(?: |$))*")
_CHUNK = 1 << 18  # numbers; what is rounded stays in the cache until it is hashed
_SHOW_PROGRESS = 10**9  # bytes; about half a second

# A sample is one number out of the middle of each weight. Rounding to bfloat16 moves it by 2^-9 of its value; another
# model's is unrelated. Below the absolute tolerance float16 rounds to nothing.
_RTOL, _ATOL = 1e-2, 1e-6

#: Parameter -> (its state when it was read, {(precision, rounded to before): digest}).
_known = WeakTensorKeyDictionary()


def frozen(t5: nn.Module, trained: Iterable[str]) -> Weights:
    """The T5's weights but for the ``trained`` ones, in the order of their names."""
    trained = set(trained)
    found: Weights = {name: p if _is_plain(p) else None for name, p in t5.named_parameters() if name not in trained}
    tied = (getattr(t5, "_tied_weights_keys", None) or ()) if t5.config.tie_word_embeddings else ()
    for path, module in t5.named_modules():
        # torch's own quantised linears have no parameter, but a method of that name; a tied head is a copy then
        if callable(getattr(module, "weight", None)) and f"{path}.weight" not in tied:
            found[f"{path}.weight"] = None
    return dict(sorted(found.items()))


def _is_plain(parameter: Tensor) -> bool:
    dense = type(parameter.data) is Tensor and parameter.layout == torch.strided and not parameter.is_meta
    return dense and parameter.is_floating_point()


def sample(weights: Weights) -> Tensor:
    """One number out of the middle of each weight, NaN for one that has none: cheap, and says who is a stranger."""
    numbers = [
        torch.tensor(torch.nan) if w is None else w.detach().flatten()[w.numel() // 2].float().cpu()
        for w in weights.values()
    ]
    return torch.stack(numbers) if numbers else torch.empty(0)


def record(weights: Weights) -> Record:
    """The digests of all weights, to be kept in a checkpoint."""
    plain = {name: w for name, w in weights.items() if w is not None}
    wanted = {name: [w.dtype, *_NARROWER.get(w.dtype, ())] for name, w in plain.items()}
    _read((w, [(precision, None) for precision in wanted[name]]) for name, w in plain.items())
    entry = lambda name: " ".join(  # noqa: E731
        f"{_spelling(precision)}:{_digest_of(plain[name], precision)}" for precision in wanted.get(name, ())
    )
    return {name: entry(name) for name in weights}


def is_record(value: object) -> bool:
    """Whether ``value``, read from a file, is a :data:`Record`."""
    return isinstance(value, dict) and all(isinstance(e, str) and _ENTRY.fullmatch(e) for e in value.values())


def difference(weights: Weights, theirs: Tensor, digests: Record | None) -> tuple[str | None, list[str]]:
    """Compare a T5's frozen weights with what a checkpoint says of the T5 it was trained on.

    Args:
        weights: of :func:`frozen`.
        theirs: the checkpoint's :func:`sample`, of as many weights.
        digests: its :func:`record`; None for an old file, which has a sample only.

    Returns:
        In words what tells the two T5s apart, or None; and the weights that could not be compared value by value.
    """
    names = list(weights)
    if digests is not None and digests.keys() != weights.keys():
        return f"{min(weights.keys() ^ digests.keys())} is frozen in one of the two only", []
    ours = sample(weights)
    known = torch.tensor([w is not None for w in weights.values()]) & ~(
        torch.tensor([digests is not None and not digests[name] for name in names])
    )
    differs = ~torch.isclose(ours, theirs.float(), rtol=_RTOL, atol=_ATOL, equal_nan=True) & known
    if differs.any():
        first = int(differs.nonzero()[0])
        return f"its frozen {names[first]} held {theirs[first]:.6g} where this one holds {ours[first]:.6g}", []
    if digests is None:
        return None, [name for name, w in weights.items() if w is None]
    return _difference_of_digests(weights, digests)


def _difference_of_digests(weights: Weights, digests: Record) -> tuple[str | None, list[str]]:
    said = {name: dict(part.split(":") for part in entry.split()) for name, entry in digests.items()}
    shared = {name: None if w is None else _shared_precision(w, said[name]) for name, w in weights.items()}
    _read((weights[name], [(precision, None)]) for name, precision in shared.items() if precision is not None)
    for name, precision in shared.items():
        if precision is None or _digest_of(weights[name], precision) == said[name][_spelling(precision)]:
            continue
        if not _is_rounding(weights[name], said[name]):
            return f"its frozen {name} held other values than this one's", []
    return None, [name for name, precision in shared.items() if precision is None]


def _shared_precision(weight: Tensor, said: Mapping[str, str]) -> torch.dtype | None:
    """The precision that both sides have digests in and that is one side's own; None where there is none."""
    for precision in (weight.dtype, *_NARROWER.get(weight.dtype, ())):
        own = next(iter(said), None) == _spelling(precision)
        if _spelling(precision) in said and (own or precision == weight.dtype):
            return precision
    return None


def _is_rounding(weight: Tensor, said: Mapping[str, str]) -> bool:
    """Whether one side is the other, rounded to a narrower precision and widened again."""
    for narrow in _NARROWER.get(weight.dtype, ()):
        if said.get(_spelling(narrow)) != _digest_of(weight, narrow):
            continue
        rounded = _digest_of(weight, weight.dtype, narrow)
        if rounded in (_digest_of(weight, weight.dtype), said.get(_spelling(weight.dtype))):
            return True
    return False


def _digest_of(weight: Tensor, precision: torch.dtype, through: torch.dtype | None = None) -> str:
    """The digest of ``weight`` in ``precision``, after rounding it to ``through``."""
    _read([(weight, [(precision, through)])])
    return _known[weight][1][precision, through]


def _read(wanted: Iterable[tuple[Tensor, list[tuple[torch.dtype, torch.dtype | None]]]]) -> None:
    """Compute the digests that are not known yet, several weights at a time."""
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


def _progress(total: int):
    from transformers.utils import logging  # its bars are those that a user of transformers has switched on or off

    quiet = True if total < _SHOW_PROGRESS else None  # None: only on a terminal
    return logging.tqdm(desc="reading the T5's weights", total=total, unit="B", unit_scale=True, disable=quiet)


def _compute(weight: Tensor, precision: torch.dtype, through: torch.dtype | None) -> str:
    sha = hashlib.sha256(f"{list(weight.shape)} {precision}".encode())
    for chunk in weight.reshape(-1).split(_CHUNK):
        chunk = chunk.to(precision) if through is None else chunk.to(through).to(precision)
        sha.update(chunk.cpu().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _state(weight: Tensor) -> tuple:
    """What changes when a weight's values do. Writing through ``.data`` leaves its version: hence the few values."""
    version = None if weight.is_inference() else weight._version
    few = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:65].double().tolist()
    return version, weight.data_ptr(), weight.dtype, str(few)


def _spelling(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
