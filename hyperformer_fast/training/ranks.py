"""What a training does when it is spread over several processes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..sharding import is_fsdp2, is_sharded

T = TypeVar("T")

#: What gloo, NCCL and torch's store say when the process at the other end is gone.
_PEER_GONE = re.compile(
    "connection (was )?(closed|reset|refused)|broken pipe|remote process exited|timed out waiting|store.*failed",
    re.IGNORECASE,
)


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed; its own message says why."""


def rank_and_size() -> tuple[int, int]:
    """Return (number of this process, number of processes); (0, 1) without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of a ``torchrun``, if this is one of its processes, and leave it again.

    Raises:
        OtherProcessFailed: another process left it before.
    """
    ours = int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized()
    if ours:
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())
    try:
        with lost_process_explained():
            yield
    finally:
        # A process can hang on exit while a gloo group is alive.
        if ours and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
            PartialState._reset_state()


def on_first(act: Callable[[], T]) -> T:
    """Call ``act`` on process 0 only, and return its result on all of them.

    An exception is raised on all of them too, so that none waits for process 0.
    """
    rank, size = rank_and_size()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = act()
        except Exception as error:
            told[1] = error
    if size > 1:
        dist.broadcast_object_list(told, src=0)
    result, refusal = told
    if refusal is not None:
        raise refusal
    return result


def together(act: Callable[[], T]) -> T:
    """Call ``act`` on every process. If it raises on any, all of them raise, so that none waits for another.

    Raises:
        OtherProcessFailed: it raised on another process only.
    """
    rank, size = rank_and_size()
    result: Any = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as raised:
        error = raised
    if size > 1:
        said: list[str | None] = [None] * size
        dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            failed = [(other, text) for other, text in enumerate(said) if text is not None]
            if failed:
                raise OtherProcessFailed(f"process {failed[0][0]} failed: {failed[0][1]}")
    if error is not None:
        raise error
    return result


def expect_one_run(world_size: int) -> None:
    """Raise ValueError if a launcher started several processes and the Trainer takes each for a run of its own.

    Args:
        world_size: the Trainer's number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and world_size == 1:
        raise ValueError(
            f"{started} processes were started, but each would train by itself, into the same folder: on a machine "
            "without an accelerator set use_cpu=True and ddp_backend='gloo' in the training arguments"
        )


def explain_lost_process(error: RuntimeError) -> OtherProcessFailed | None:
    """Return what to say of an error that only means that another process is gone; None for any other error."""
    if rank_and_size()[1] == 1 or not _PEER_GONE.search(str(error)):
        return None
    return OtherProcessFailed(
        "another process of this run failed or was killed (its own message, if any, says why). Checkpoints "
        "are whole: start a training again with --resume_from_checkpoint true"
    )


@contextlib.contextmanager
def lost_process_explained() -> Iterator[None]:
    """Raise OtherProcessFailed in place of an error that only means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        lost = explain_lost_process(error)
        if lost is None:
            raise
        raise lost from error


def expect_fsdp2(args: Any) -> None:
    """Raise ValueError if the training arguments, or accelerate's launcher, ask for FSDP of another version than 2.

    transformers 4.57 does not tell accelerate the version that its arguments have, so this does.
    """
    if not _wants_fsdp(args):
        return
    said = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version") or (args.fsdp_config or {}).get(
        "version"
    )
    version = str(said or os.environ.get("FSDP_VERSION") or 2)
    if version != "2":
        raise ValueError(
            f"fsdp_version is {version}, but a frozen T5 with trained adapters needs version 2: set fsdp_config to "
            '{"fsdp_version": 2}, or start with accelerate launch --fsdp_version 2'
        )
    os.environ["FSDP_VERSION"] = version


def _wants_fsdp(args: Any) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard_on_cpus(trainer: Any) -> None:
    """Let accelerate shard the model over CPUs, too. By itself it would train with plain copies there, and not say so.

    To be called once the Trainer has its accelerator.
    """
    state = trainer.accelerator.state
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if not _wants_fsdp(trainer.args) or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(getattr(trainer.args, "fsdp_plugin_args", None) or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def expect_all_sharded(model: Any) -> None:
    """Raise ValueError if FSDP2 was told to leave out a trained parameter: its copies would go different ways."""
    if not is_fsdp2(model):
        return
    left = next((name for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p)), None)
    if left is not None:
        raise ValueError(
            f"FSDP2 was told to ignore {left}, which is trained: its gradients would stay in each process, and its "
            "copies would differ. Take it out of fsdp_ignored_modules"
        )
