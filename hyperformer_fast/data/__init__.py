"""Text-to-text tasks: their specifications, where their rows are read from, and how they are sampled and batched."""

from .collate import Collator, EncodedExamples
from .jsonl import read_jsonl
from .sampler import TaskBatchSampler, task_probabilities
from .sources import Example, TaskData, UnknownTask, available_tasks, load_tasks
from .tasks import DataError, TaskSpec

__all__ = [
    "Collator",
    "DataError",
    "EncodedExamples",
    "Example",
    "TaskBatchSampler",
    "TaskData",
    "TaskSpec",
    "UnknownTask",
    "available_tasks",
    "load_tasks",
    "read_jsonl",
    "task_probabilities",
]
