"""Train, evaluate and predict with whole runs, using Hugging Face's Trainer."""

from ..extras import require

require("training", "accelerate", "datasets", "numpy", "rich", "scipy", "sklearn")

from .arguments import HyperFormerTrainingArguments, RunArguments
from .evaluate import evaluate_run
from .folder import RunError
from .predict import predict_run
from .run import train_run
from .run_config import RunConfig
from .trainer import HyperFormerTrainer, TrainingDiverged

__all__ = [
    "HyperFormerTrainer",
    "HyperFormerTrainingArguments",
    "RunArguments",
    "RunConfig",
    "RunError",
    "TrainingDiverged",
    "evaluate_run",
    "predict_run",
    "train_run",
]
