"""Check the files of a checkpoint that a run resumes from, so that it continues as if it had never stopped.

Everything is checked before it reaches the optimizer: AdamW's fused kernels trust the shapes of the state, and a wrong
one corrupts memory. ``HyperFormerModel.load_weights`` checks the weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, trainer

from ..checkpoint import CheckpointError
from ..json_files import parse
from .folder import rng_files

OPTIMIZER_NAME, SCHEDULER_NAME, STATE_NAME = "optimizer.pt", "scheduler.pt", "trainer_state.json"


def read_saved(path: Path) -> Any:
    """Load a file of ``torch.save`` without running code from it. Raises CheckpointError, which names the file."""
    try:
        with trainer.safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive or pickle raises errors of almost any class
        raise CheckpointError(f"{path} cannot be read: {str(error).strip() or type(error).__name__}") from error


def check_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Check ``trainer_state.json`` and return its content.

    Raises:
        CheckpointError: the file is not a Trainer's state, or its step differs from the one in the checkpoint's name.
    """
    path = checkpoint / STATE_NAME
    try:
        state = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(state).__name__}")
    for field, value in state.items():
        _check_state_field(path, field, value)
    step = state.get("global_step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: global_step must be a whole number, got {step!r}")
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if number and step != int(number[1]):
        raise CheckpointError(f"{path}: global_step is {step}, but the checkpoint was saved at step {int(number[1])}")
    history = state.get("log_history", [])
    if not all(isinstance(entry, dict) and type(entry.get("step")) is int for entry in history):
        raise CheckpointError(f"{path}: log_history must be a list of objects, each with a whole number as step")
    return state


def _check_state_field(path: Path, field: str, value: Any) -> None:
    """Raise CheckpointError unless the field is one of TrainerState and its value has the field's type or is null."""
    default = TrainerState()
    if field not in {known.name for known in dataclasses.fields(default)}:
        raise CheckpointError(f"{path}: unknown field {field!r}")
    number = (int, float)
    kinds: dict[type, tuple[type, ...]] = {
        bool: (bool,), int: number, float: number, list: (list,), dict: (dict,)
    }  # fmt: skip
    kind = kinds.get(type(getattr(default, field)), (*number, str, dict, list))
    if value is not None and not isinstance(value, kind):
        raise CheckpointError(f"{path}: {field} has the wrong type, {type(value).__name__}")


def check_rng_states(checkpoint: Path, rank: int, world_size: int) -> bool:
    """Return whether as many processes saved the checkpoint as now resume from it; if not, warn.

    Raises:
        CheckpointError: there is no RNG state, or this process's is not valid.
    """
    wanted = {"rng_state.pth"} if world_size == 1 else {f"rng_state_{i}.pth" for i in range(world_size)}
    there = rng_files(checkpoint)
    if not there:
        raise CheckpointError(
            f"{checkpoint}: without saved RNG states (rng_state*.pth) it would become a different run"
        )
    if there != wanted:
        if rank == 0:
            warnings.warn(
                f"{checkpoint} was saved by {len(there)} process{'es' * (len(there) > 1)} and {world_size} resume"
                f"{'s' * (world_size == 1)}: the batches are those of the same run, but dropout draws other numbers",
                stacklevel=2,
            )
        return False
    path = checkpoint / ("rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth")
    state = read_saved(path)
    if not isinstance(state, dict) or not {"python", "numpy", "cpu"} <= state.keys():
        raise CheckpointError(f"{path} does not hold the RNG states of Python, NumPy and torch")
    _check_numpy_state(path, state["numpy"])
    return True


def _check_numpy_state(path: Path, state: Any) -> None:
    """Raise CheckpointError unless ``state`` is valid: NumPy does not check the position and reads out of bounds."""
    right = (
        isinstance(state, (tuple, list))
        and len(state) == 5
        and state[0] == "MT19937"
        and isinstance(state[1], np.ndarray)
        and (state[1].dtype, state[1].shape) == (np.uint32, (624,))
        and type(state[2]) is int
        and 0 <= state[2] <= 624
    )
    if not right:
        raise CheckpointError(f"{path}: the RNG state of NumPy is not valid")


def read_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a saved state of ``optimizer``, which has not stepped yet, for its ``load_state_dict``.

    Everything in a state of Adam or AdamW is checked. Of other optimizers only the number of parameter groups is.

    Raises:
        CheckpointError: the state does not fit; the message names the file and the parameter.
    """
    saved, fresh = read_saved(path), optimizer.state_dict()
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict) or not _is_groups(saved):
        raise CheckpointError(f"{path} does not hold an optimizer's state")
    if len(saved["param_groups"]) != len(fresh["param_groups"]):
        raise CheckpointError(
            f"{path} has {len(saved['param_groups'])} parameter groups, this optimizer {len(fresh['param_groups'])}"
        )
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return saved
    for i, (theirs, ours) in enumerate(zip(saved["param_groups"], fresh["param_groups"], strict=True)):
        _check_group(f"{path}: group {i}", theirs, ours)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    odd = set(saved["state"]) ^ set(range(len(parameters)))
    if odd:
        raise CheckpointError(
            f"{path} must hold a state for each of {len(parameters)} parameters; it has {len(saved['state'])}, and "
            f"differs in {sorted(odd, key=repr)[0]!r}"
        )
    moments = {"exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if optimizer.defaults["amsgrad"] else set())
    memory: set[int] = set()
    for i, parameter in enumerate(parameters):
        _check_adam_state(f"{path}: parameter {i}", saved["state"][i], parameter, moments, memory)
    return saved


def _is_groups(saved: Mapping[str, Any]) -> bool:
    groups = saved.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, dict) for group in groups)


def _check_group(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in sorted(theirs.keys() | ours.keys(), key=repr):
        if name not in ours:
            raise CheckpointError(f"{where} has the unknown setting {name!r}")
        if name not in theirs:
            raise CheckpointError(f"{where} lacks {name}")
        if name != "lr" and not _same(theirs[name], ours[name]):
            raise CheckpointError(f"{where} has {name} {_short(theirs[name])}, this optimizer {_short(ours[name])}")
    if not _is_number(theirs["lr"]):
        raise CheckpointError(f"{where} has the learning rate {_short(theirs['lr'])}")


def _check_adam_state(where: str, state: Any, parameter: Tensor, moments: set[str], memory: set[int]) -> None:
    """Check the state of one parameter. ``memory`` collects the moments' addresses: no two may share memory."""
    if not isinstance(state, dict) or state.keys() != moments | {"step"}:
        names = sorted(state, key=repr) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{where} must have {', '.join(sorted(moments | {'step'}))}, got {names}")
    step = state["step"]
    if isinstance(step, Tensor):
        step = step.item() if step.dim() == 0 and step.is_floating_point() else None
    if not _is_number(step):
        raise CheckpointError(f"{where}: step must be one finite number >= 0, got {_short(state['step'])}")
    # Not empty_like, which gives the part of a sharded parameter.
    expected = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    for name in sorted(moments):
        moment = state[name]
        if not isinstance(moment, Tensor) or moment.is_meta or _form(moment) != _form(expected):
            got = _form(moment) if isinstance(moment, Tensor) else type(moment).__name__
            raise CheckpointError(f"{where}: {name} must be {_form(expected)}, got {got}")
        if not moment.isfinite().all():
            raise CheckpointError(f"{where}: {name} is not finite")
        if name != "exp_avg" and (moment < 0).any():
            raise CheckpointError(f"{where}: {name} is a mean of squares, but has a negative value")
        if moment.numel():
            place = moment.untyped_storage().data_ptr()
            if place in memory:
                raise CheckpointError(f"{where}: {name} shares memory with another moment")
            memory.add(place)


def read_scheduler(
    path: Path, scheduler: Any, optimizer_state: Mapping[str, Any], step: int, may_lag: bool, other_length: bool
) -> dict[str, Any]:
    """Read a saved state of ``scheduler``, for its ``load_state_dict``.

    Args:
        path: path of ``scheduler.pt``.
        scheduler: the scheduler, which has not stepped yet. Unless it is a ``LambdaLR``, the state is not checked.
        optimizer_state: what :func:`read_optimizer` returned. Its learning rates must be the schedule's.
        other_length: the run now has another number of steps. The learning rates are then set to those of the new
            schedule, in ``optimizer_state`` too.
        step: the Trainer's step at which the checkpoint was saved.
        may_lag: allow a schedule that is behind ``step``, because a gradient scaler may skip steps.

    Raises:
        CheckpointError: the state does not fit; the message names the file and the field.
    """
    saved = read_saved(path)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} does not hold a scheduler's state")
    if not isinstance(scheduler, LambdaLR):
        return saved
    fresh = scheduler.state_dict()
    moving = {"last_epoch", "_step_count", "_last_lr"}
    for name in sorted(saved.keys() | fresh.keys(), key=repr):
        if name not in fresh or name not in saved:
            raise CheckpointError(f"{path} {'has the unknown' if name in saved else 'lacks the'} field {name!r}")
        if name not in moving and not _same(saved[name], fresh[name]):
            raise CheckpointError(f"{path}: {name} was {_short(saved[name])} and is now {_short(fresh[name])}")
    at = saved["last_epoch"]
    if type(at) is not int or not 0 <= at <= step or (at < step and not may_lag):
        raise CheckpointError(f"{path}: last_epoch must be {step}, the checkpoint's step, got {_short(at)}")
    if type(saved["_step_count"]) is not int:
        raise CheckpointError(f"{path}: _step_count must be a whole number, got {_short(saved['_step_count'])}")
    expected = [base * rule(at) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    if other_length:
        for group, rate in zip(optimizer_state["param_groups"], expected, strict=True):
            group["lr"] = rate
        return {**saved, "_last_lr": expected}
    rates = [group["lr"] for group in optimizer_state["param_groups"]]
    for file, found in ((path.name, saved["_last_lr"]), (OPTIMIZER_NAME, rates)):
        if not _same(found, expected):
            raise CheckpointError(
                f"{path.with_name(file)}: the learning rate at step {at} is {_short(expected)}, got {_short(found)}"
            )
    return saved


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal. Numbers may differ by rounding, as between versions of a library."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, (int, float)):
        return type(one) is type(other) and not isinstance(one, Tensor) and one == other
    return isinstance(other, (int, float)) and math.isclose(one, other, rel_tol=1e-9, abs_tol=0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _form(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
