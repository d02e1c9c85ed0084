"""The tasks of one forward as tensors, so that a compiled forward does not depend on their names.

A list of names becomes numbers on the model's device. The numbers of the last lists are kept there, because the names
of a batch come again, and a copy to a GPU that has to wait for it stalls the host.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code
from torch.utils._python_dispatch import _get_current_dispatch_mode as _current_mode

from .config import HyperFormerConfig
from .ops.checks import check_task_range

if TYPE_CHECKING:
    from .model import HyperFormerModel
    from .task_order import TaskOrder


class Selection(NamedTuple):
    """What a forward needs of its tasks.

    Args:
        rows: [R] the tasks to generate weights for, None: all of them.
        task_index: [B] each sample's row among these, None: every sample has the one row.
        samples: B, None where one task is for a batch of any size.
        tasks: the indices of the tasks to generate weights for, as ``rows`` has them. None: all of them, or a graph is
            compiled, which must not depend on them.
        places: each sample's place in ``tasks``, as ``task_index`` has it.
    """

    rows: Tensor | None
    task_index: Tensor | None
    samples: int | None = None
    tasks: Sequence[int] | None = None
    places: Sequence[int] | None = None


#: How many lists of task numbers are kept, for all models of the process.
_KEPT = 1024


class _Numbers:
    """Lists of integers as tensors on a device; the last ``_KEPT`` are kept.

    Each stream of a GPU has tensors of its own, because the copy to the GPU is only ordered before what the same stream
    does later. A list that a CUDA graph was captured with is kept for good, because a replay of the graph reads it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: collections.OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = collections.OrderedDict()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def on(self, device: torch.device, numbers: Sequence[int]) -> Tensor:
        """Return ``numbers`` as int64 on ``device``, without waiting for it. The tensor must not be written to.

        Raises:
            RuntimeError: a CUDA graph is being captured, and these numbers are not on the device yet.
        """
        if torch.compiler.is_compiling() or _current_mode() is not None:
            # Fake tensors and their like must not be kept.
            return torch.tensor(numbers, device=device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, *numbers)
        with self._lock:
            made = self._made.get(key)
            if made is None and capturing:
                # A capture has a stream of its own, and begins when the GPU is done with all others.
                other = next((k for k in self._made if k[0] == device and k[2:] == key[2:]), None)
                if other is not None:
                    made = self._made[key] = self._made[other]
            if made is None:
                if capturing:
                    raise RuntimeError(
                        "this list of tasks is new, and its numbers cannot be copied to the GPU while a CUDA graph is "
                        "captured: run the model with it once before the capture, or pass task_index, on the GPU"
                    )
                made = self._made[key] = self._make(device, numbers)
                if len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            if capturing:
                self._captured.append(made)
        return made[1]

    @staticmethod
    def _make(device: torch.device, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        # Autograd refuses to save what was made in inference mode, and a later training step may use these numbers.
        with torch.inference_mode(False):
            source = torch.tensor(numbers, dtype=torch.long)
            if device.type != "cuda":
                return source, source.to(device)
            # Copying from pinned memory does not wait. The source is kept with the copy, until that has been made.
            source = source.pin_memory()
            return source, source.to(device, non_blocking=True)


_numbers = _Numbers()


def _are_numbers(task: Any) -> bool:
    """Whether ``task`` holds what a dataset's ClassLabel column does: integers, in a list, an array or a tensor."""
    if isinstance(task, Sequence):
        return bool(task) and all(isinstance(each, int) for each in task)
    return isinstance(task, int) or hasattr(task, "dtype")


class TaskChoice:
    """Task names turned into tensors.

    ``HyperFormerModel`` makes one in a forward pre-hook, which torch.compile leaves outside of the graph: a compiled
    forward guards on the attributes that it reads, which for every task are tensors of the same shape, and not on
    names, so that another task needs no other graph.
    """

    def __init__(self, config: HyperFormerConfig, task: str | Sequence[str], device: torch.device):
        self.config, self.task = config, task
        if isinstance(task, str):
            names, self.samples = [task], None
        elif isinstance(task, Sequence) and task and all(isinstance(name, str) for name in task):
            names, self.samples = list(dict.fromkeys(task)), len(task)
        elif _are_numbers(task):
            raise ValueError(
                f"task takes names, got the numbers {task!r}: pass them as task_index= if they are indices into the "
                f"model's tasks ({', '.join(config.tasks)}); else turn them into names (a ClassLabel does by int2str)"
            )
        else:
            raise ValueError(f"task must be a name or a list of names, one per sample, got {task!r}")
        ids = self.ids = config.task_ids(names)
        self.is_single = len(ids) == 1
        if self.is_single:
            # A fill, because a copy from the host would wait for the GPU.
            self.rows = torch.full((1,), ids[0], dtype=torch.long, device=device)
            return
        place = {name: i for i, name in enumerate(names)}
        index = self.places = [place[name] for name in task]
        # One tensor for all three.
        numbers = _numbers.on(device, [*ids, *index, *(ids[i] for i in index)])
        self.rows, self.index, self.every = numbers.split([len(ids), len(index), len(index)])

    def selection(self) -> Selection:
        """The rows to generate: only those of the chosen tasks, but all of them where a graph is compiled for several
        tasks, because the number of chosen ones would become part of the graph."""
        compiling = torch.compiler.is_compiling()
        if self.is_single:
            return Selection(self.rows, None, self.samples, None if compiling else self.ids)
        if compiling:
            return Selection(None, self.every, self.samples)
        return Selection(self.rows, self.index, self.samples, self.ids, self.places)


class NewTask(TaskChoice):
    """A task that the model does not have: the embedding [dim] that is all of it, while it is learned."""

    def __init__(self, embedding: Tensor):
        self.embedding = embedding

    def selection(self) -> Selection:
        """One row of weights for a batch of any size."""
        return Selection(None, None)


def index_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """``numbers`` as int64 on ``device``, kept for the next call with the same ones. It must not be written to."""
    return _numbers.on(device, numbers)


def select(
    config: HyperFormerConfig, task: Any, task_index: Tensor | None, device: torch.device, order: TaskOrder
) -> Selection:
    """What ``task`` (names, or a :class:`TaskChoice`) or ``task_index`` [B] stand for. ValueError where neither or both
    are given, a task is unknown, or an index may have been computed for other tasks than those that there are now."""
    if task is not None and task_index is not None:
        raise ValueError("give task or task_index, not both")
    if task_index is not None:
        _check_task_index(task_index, len(config.tasks))
        return Selection(None, order.checked(task_index, config.tasks).to(device), task_index.shape[0])
    if task is None:
        if len(config.tasks) > 1:
            raise ValueError(f"say which task: task= or task_index=; this model has {', '.join(config.tasks)}")
        task = config.tasks[0]
    if isinstance(task, TaskChoice) and not torch.compiler.is_compiling() and task.config is not config:
        task = task.task  # another thread has added or removed tasks since this was chosen
    choice = task if isinstance(task, TaskChoice) else TaskChoice(config, task, device)
    return choice.selection()


def _choose(config: HyperFormerConfig, task: str | Sequence[str], device: torch.device) -> TaskChoice:
    return TaskChoice(config, task, device)


_choose_eagerly = torch.compiler.disable(_choose)


def choose_outside_the_graph(
    model: HyperFormerModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a model: names become a :class:`TaskChoice` before a compiled forward could see them."""
    task = kwargs.get("task")
    if task is None or isinstance(task, TaskChoice) or kwargs.get("task_index") is not None or model.t5 is None:
        return None
    task_embeddings = model.task_embeddings
    first = next(itertools.chain(task_embeddings.parameters(), task_embeddings.buffers()), None)
    if first is None:
        # A replica of nn.DataParallel has plain attributes in place of parameters. Its forward chooses.
        return None
    # Within a module that is compiled as a whole this hook is a part of the graph.
    choose = _choose if torch.compiler.is_compiling() else _choose_eagerly
    return args, {**kwargs, "task": choose(model.hyperformer_config, task, first.device)}


# torch.compile leaves the hooks of the module that it compiles outside of the graph, but makes a graph of its own of
# each, unless its code is to be skipped. torch.compiler.disable would also break the graph of a module around this one.
skip_code(choose_outside_the_graph.__code__)


def _check_task_index(task_index: Any, T: int) -> None:
    if not isinstance(task_index, Tensor):
        raise ValueError(f"task_index must be a tensor, got {task_index!r}")
    if task_index.dim() != 1 or task_index.dtype not in (torch.int32, torch.int64):
        got = f"{task_index.dtype} {list(task_index.shape)}"
        raise ValueError(f"task_index must be [B] in int32 or int64, got {got}")
    if not torch.compiler.is_compiling():
        check_task_range(task_index, T)
