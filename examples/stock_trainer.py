"""HyperFormer++ in Hugging Face's own Seq2SeqTrainer: two tasks, mixed in every batch.

    python examples/stock_trainer.py --max_steps 300
    python examples/stock_trainer.py --max_steps 300 --resume_from_checkpoint true

Nothing here is ours but the model. The column ``task_index`` says which task each example is of; the Trainer passes it
on to the model, in training, evaluation and generation. The T5 is the small one in the package, so that this runs in a
minute on a CPU and downloads nothing; put yours in ``load_t5``, and your rows in ``load_rows``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model, parameter_groups
from hyperformer_fast.data.builtin import load_builtin
from hyperformer_fast.tiny import load_tiny

TASKS = ["topic", "entailment"]
TARGETS = {"topic": ["sport", "food", "music", "weather"], "entailment": ["yes", "no"]}

DEFAULTS = {
    "output_dir": "stock-trainer-output",
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "predict_with_generate": True,
    "generation_max_length": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_steps": 50,
    "logging_steps": 25,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "save_total_limit": 2,
    "report_to": "none",
}


def load_t5() -> tuple[Any, Any]:
    """A T5 and its tokenizer, for instance T5ForConditionalGeneration.from_pretrained("t5-base")."""
    return load_tiny()


def load_rows(split: str) -> Dataset:
    """The rows of both tasks: source, target and task_index."""
    rows = []
    for index, task in enumerate(TASKS):
        for row in load_builtin(task, split):
            texts = [value for name, value in row.items() if name != "label"]
            rows.append(
                {"source": " ".join([task, *texts]), "target": TARGETS[task][row["label"]], "task_index": index}
            )
    return Dataset.from_list(rows).shuffle(seed=0)


def main(argv: list[str] | None = None) -> Seq2SeqTrainer:
    parser = HfArgumentParser(Seq2SeqTrainingArguments)
    parser.set_defaults(**DEFAULTS)
    (args,) = parser.parse_args_into_dataclasses(argv)
    t5, tokenizer = load_t5()
    model = get_hyperformer_model(t5, HyperFormerConfig(tasks=TASKS, reduction_factor=8))
    model.print_trainable_parameters()

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["source"], text_target=rows["target"], max_length=128, truncation=True)

    def texts(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        pairs = list(zip(texts(evaluation.predictions), texts(evaluation.label_ids), strict=True))
        return {"accuracy": sum(prediction == label for prediction, label in pairs) / len(pairs)}

    data = {split: load_rows(split).map(encode, batched=True) for split in ("train", "validation", "test")}
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
        # A learning rate for each part of the model; the Trainer's own optimizer would give all of them one.
        optimizers=(torch.optim.AdamW(parameter_groups(model, args.learning_rate)), None),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    trainer.save_model()
    print(trainer.evaluate(data["test"], metric_key_prefix="test"))
    return trainer


if __name__ == "__main__":
    main()
