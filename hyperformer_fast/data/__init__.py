"""Text-to-text tasks: their specifications, where their rows are read from, and how they are sampled and batched."""

from .collate import HyperFormerDataCollator
from .deprecated import Collator, EncodedExamples, Example, read_jsonl
from .encode import encode
from .examples import TaskData
from .formats import read_rows
from .sampler import TaskBatchSampler, task_probabilities
from .sources import UnknownTask, available_tasks, load_tasks
from .tasks import DataError, TaskSpec

__all__ = [
    "Collator",
    "DataError",
    "EncodedExamples",
    "Example",
    "HyperFormerDataCollator",
    "TaskBatchSampler",
    "TaskData",
    "TaskSpec",
    "UnknownTask",
    "available_tasks",
    "encode",
    "load_tasks",
    "read_jsonl",
    "read_rows",
    "task_probabilities",
]
