"""Translate the fields of the authors' JSON files: some are used, some ignored with a warning, some refused.

Their files have the arguments of a whole training run (github.com/rabeehk/hyperformer, ``training_args.py``) and can
also configure methods other than HyperFormer: plain adapters and fine-tuning.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

#: Defaults of the authors' MetaAdapterConfig and ModelArguments that differ from ours.
DEFAULTS = {
    "non_linearity": "swish",
    "reduction_factor": 16,
    "task_embedding_dim": 512,
    "conditional_layer_norm": False,
    "unique_hyper_net": False,
    "efficient_unique_hyper_net": False,
    "unfreeze_layer_norms": False,
}

_OF_THE_T5 = "belongs to the T5: set it in the configuration of the T5 that you pass"

#: Fields that change the model, or which of its parameters are trained, in ways that are not supported here, with what
#: they do and what to do instead. They have no effect if they are absent, null or false.
_UNSERVED = {
    "unfreeze_model": "trains the whole T5, which is frozen here except for its layer norms and its head",
    "freeze_model": "freezes the hypernetworks too: call requires_grad_(False) on the wrapped model instead",
    "freeze_model_but_lm_head": "freezes the hypernetworks too: call requires_grad_(False) on them instead",
    "freeze_model_but_task_embeddings": "freezes everything except the task embeddings: call "
    "model.hypernetworks.requires_grad_(False) on the wrapped model instead",
    "freeze_encoder": "freezes the encoder's hypernetwork too: call "
    "model.hypernetworks['encoder'].requires_grad_(False) on the wrapped model instead",
    "generate_classifier_weights": "generates the output head, which no variant here does",
    "encoder_layerdrop": _OF_THE_T5,
    "decoder_layerdrop": _OF_THE_T5,
    "dropout": _OF_THE_T5,
    "attention_dropout": _OF_THE_T5,
}

#: Fields that are checked by other functions, and ``freeze_embeds``, which asks for what is always done here.
_CHECKED = {"train_adapters", "adapter_config_name", "train_adapters_blocks", "task_embeddings", "freeze_embeds"}

#: Fields that the authors' hypernetworks never read.
_WITHOUT_EFFECT = set(
    "hidden_dim weight_init_range adapters task_to_adapter parametric_task_embedding task_embedding_dir device".split()
)

#: Fields that configure their training, data or T5, including the TrainingArguments of transformers 3.5.1.
_OF_TRAINING = set(
    """
    model_name_or_path not_load_t5_checkpoint config_name tokenizer_name cache_dir input_dim eval_tasks
    max_source_length max_target_length val_max_target_length test_max_target_length n_train n_val n_test eval_beams
    ignore_pad_token_for_loss data_seed label_smoothing predict_with_generate adafactor lr_scheduler temperature
    do_test eval_output_dir optimize_from_scratch optimize_from_scratch_with_loading_model split_validation_test
    print_num_parameters compute_memory compute_time output_dir overwrite_output_dir do_train do_eval do_predict
    model_parallel evaluate_during_training evaluation_strategy prediction_loss_only per_device_train_batch_size
    per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size gradient_accumulation_steps
    eval_accumulation_steps learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    num_train_epochs max_steps warmup_steps logging_dir logging_first_step logging_steps save_steps save_total_limit
    no_cuda seed fp16 fp16_opt_level local_rank tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps
    dataloader_num_workers past_index run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end
    metric_for_best_model greater_is_better
    """.split()
)


def translate(fields: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """Translate the authors' ``fields`` into fields of HyperFormerConfig; absent ones get the authors' defaults.

    A warning names the fields that are ignored.

    Args:
        fields: the authors' configuration.
        ours: names of the fields that mean the same in HyperFormerConfig.

    Raises:
        ValueError: the configuration is of another method, or a field has a value that is not supported here.
        TypeError: ``fields`` is not a mapping.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"the authors' configuration must be a mapping, or the path of a JSON file, got {type(fields).__name__}"
        )
    if "variant" in fields or "format_version" in fields:
        raise ValueError("this is a configuration of this library: read it with HyperFormerConfig.load")
    if isinstance(fields.get("hyperformer"), Mapping):
        raise ValueError("this is a run's configuration of this library: pass it to `hyperformer-fast train`")
    _refuse_another_method(fields)
    for name, reason in _UNSERVED.items():
        if fields.get(name):
            raise ValueError(f"{name}={fields[name]!r} is not supported: it {reason}, and remove the field")
    picked = {name: value for name, value in fields.items() if name in ours}
    if fields.get("task_embeddings") is not None:
        picked["task_to_embeddings"] = _task_to_embeddings(fields)
    _warn_of_the_rest(set(fields) - set(ours) - _UNSERVED.keys() - _CHECKED)
    return {**DEFAULTS, **picked}


def _refuse_another_method(fields: Mapping[str, Any]) -> None:
    for name in ("train_adapters", "train_adapters_blocks"):
        if not isinstance(fields.get(name, True), bool):
            raise ValueError(f"{name} must be true or false, got {fields[name]!r}")
    kind = fields.get("adapter_config_name", "meta-adapter")
    # Only the configuration of a whole run has model_name_or_path. Its default of train_adapters is false.
    whole_run = "model_name_or_path" in fields
    if not fields.get("train_adapters", not whole_run):
        said = (
            "train_adapters=False" if "train_adapters" in fields else "train_adapters is absent and defaults to false"
        )
        method = f"fine-tuning of the whole T5 ({said})"
    elif kind == "adapter":
        method = "plain adapters without a hypernetwork (adapter_config_name='adapter')"
    elif kind != "meta-adapter":
        method = f"adapter_config_name={kind!r}"
    elif not fields.get("train_adapters_blocks", True):
        method = "training without adapters (train_adapters_blocks=False)"
    else:
        return
    raise ValueError(
        f"this configures another method of the authors' code, {method}; this library has only HyperFormer: "
        "adapter_config_name='meta-adapter' with train_adapters=True, in the variants hyperformer++, "
        "hyperformer-shared and hyperformer"
    )


def _task_to_embeddings(fields: Mapping[str, Any]) -> dict[str, str]:
    """Map each of ``tasks`` to its embedding, whose names ``task_embeddings`` lists in the same order."""
    tasks, names = fields.get("tasks"), fields["task_embeddings"]
    if not isinstance(names, (list, tuple)) or not isinstance(tasks, (list, tuple)) or len(names) != len(tasks):
        raise ValueError(
            f"task_embeddings must name an embedding for each of tasks, got {names!r} for the tasks {tasks!r}"
        )
    mapping = dict(zip(tasks, names, strict=True))
    if fields.get("task_to_embeddings", mapping) not in (None, mapping):
        raise ValueError(
            f"task_to_embeddings={fields['task_to_embeddings']!r} and task_embeddings={names!r} disagree: set only one"
        )
    return mapping


def _warn_of_the_rest(rest: set[str]) -> None:
    kinds = (
        ("they configure the authors' training, not the model", rest & _OF_TRAINING),
        ("no hypernetwork of the authors' code reads them", rest & _WITHOUT_EFFECT),
        ("unknown to the authors' code (misspelt?)", rest - _OF_TRAINING - _WITHOUT_EFFECT),
    )
    found = [f"{', '.join(sorted(names))}: {reason}" for reason, names in kinds if names]
    if found:
        warnings.warn(f"fields of the authors' configuration that are ignored: {'; '.join(found)}", stacklevel=4)
