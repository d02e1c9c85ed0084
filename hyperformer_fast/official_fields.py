"""What the fields of the authors' JSON files mean here: each is used, translated, without effect, or refused.

Their files have the arguments of a whole training run (github.com/rabeehk/hyperformer, ``training_args.py``, with the
TrainingArguments of transformers 3.5.1), of HyperFormer, of plain adapters or of fine-tuning.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from .recipes import BEFORE_RECIPES

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

#: Defaults of a run of the authors' code, and of the Trainer under it, that differ from ours.
DEFAULTS_OF_A_RUN = {
    "temperature": 1.0,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
}

#: Fields of the adapters that a method reads, where it does not read all.
_READ_BY = {
    "adapters": {
        "non_linearity", "reduction_factor", "add_layer_norm_before_adapter", "add_layer_norm_after_adapter",
        "unfreeze_layer_norms", "unfreeze_lm_head", "task_to_embeddings", "train_adapters_blocks", "tasks",
    },
    "finetuning": {"tasks"},
}  # fmt: skip

_OF_THE_T5 = "belongs to the T5: set it in the configuration of the T5 that you pass"

#: Fields that change the model, or which of its parameters are trained, in ways that are not supported here, with what
#: they do and what to do instead. They have no effect if they are absent, null or false.
_UNSERVED = {
    "unfreeze_model": "trains the whole T5 beside the adapters, which no variant here does",
    "freeze_model": "freezes the hypernetworks too: call requires_grad_(False) on the wrapped model instead",
    "freeze_model_but_lm_head": "freezes the hypernetworks too: call requires_grad_(False) on them instead",
    "freeze_encoder": "freezes the encoder's hypernetwork too: call "
    "model.hypernetworks['encoder'].requires_grad_(False) on the wrapped model instead",
    "generate_classifier_weights": "generates the output head, which no variant here does",
    "encoder_layerdrop": _OF_THE_T5,
    "decoder_layerdrop": _OF_THE_T5,
    "dropout": _OF_THE_T5,
    "attention_dropout": _OF_THE_T5,
}

#: The same, of fields that only a run has.
_UNSERVED_OF_A_RUN = {
    "not_load_t5_checkpoint": "starts from a random T5: save one and name its folder in model_name_or_path",
    "config_name": "takes the T5's configuration from elsewhere: save a T5 with it and name its folder in "
    "model_name_or_path",
}

#: Fields that say which method a configuration is of, and ``freeze_embeds``, which asks for what is always done here.
_METHOD = {"train_adapters", "adapter_config_name", "train_adapters_blocks", "task_embeddings", "freeze_embeds"}

#: Fields that the authors' hypernetworks never read.
_WITHOUT_EFFECT = set(
    "hidden_dim weight_init_range adapters task_to_adapter parametric_task_embedding task_embedding_dir device".split()
)

#: Fields of a run that have another name today.
RENAMED = {
    "label_smoothing": "label_smoothing_factor",
    "evaluation_strategy": "eval_strategy",
    "lr_scheduler": "lr_scheduler_type",
    "n_train": "max_train_samples",
    "n_val": "max_eval_samples",
    "n_test": "max_predict_samples",
    "eval_beams": "generation_num_beams",
    "do_test": "do_predict",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
_SCHEDULES = {"constant_w_warmup": "constant_with_warmup", "cosine_w_restarts": "cosine_with_restarts"}

#: Fields of a run that need no successor: what they ask for is always done, or no longer exists.
_OBSOLETE = {
    "input_dim": "the T5 knows its width",
    "print_num_parameters": "the number of parameters is always printed",
    "compute_memory": "use the Trainer's skip_memory_metrics",
    "compute_time": "the time of training is always reported",
    "eval_output_dir": "results are written to output_dir",
    "optimize_from_scratch": "a run that does not resume always starts a new optimizer",
    "model_parallel": "transformers no longer has it",
    "fp16_opt_level": "transformers no longer has it",
    "tpu_num_cores": "transformers no longer has it",
    "tpu_metrics_debug": "transformers no longer has it",
    "debug": "it was a switch for TPUs",
    "past_index": "transformers no longer has it",
    "local_rank": "torchrun tells it",
    "logging_dir": "transformers no longer has it",
    "prediction_loss_only": "tasks are measured by their metrics",
    "remove_unused_columns": "columns that the model does not read are always removed",
    "label_names": "the labels are always labels",
    "disable_tqdm": "progress is shown on terminals only",
}

#: Fields of a run that say by true or false what a value of another field says today.
_SWITCHES = {
    "adafactor": ("optim", "adafactor"),
    "evaluate_during_training": ("eval_strategy", "steps"),
}

#: Fields of a run that mean the same today.
_SAME = set(
    """
    model_name_or_path tokenizer_name cache_dir tasks eval_tasks data_seed temperature split_validation_test
    max_source_length max_target_length val_max_target_length test_max_target_length ignore_pad_token_for_loss
    predict_with_generate output_dir overwrite_output_dir do_train do_eval do_predict
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps
    learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
    warmup_steps logging_first_step logging_steps save_steps save_total_limit seed fp16 dataloader_drop_last eval_steps
    dataloader_num_workers run_name optimize_from_scratch_with_loading_model
    load_best_model_at_end metric_for_best_model greater_is_better
    """.split()
)

#: Fields that only a run of the authors' code has. One of them says that a file is theirs.
_MARKS = {
    "train_adapters", "adapter_config_name", "do_test", "task_embeddings", "n_train", "n_val", "n_test", "eval_beams",
    "optimize_from_scratch", "optimize_from_scratch_with_loading_model", "print_num_parameters",
    "not_load_t5_checkpoint",
}  # fmt: skip


def is_run(fields: Mapping[str, Any]) -> bool:
    """Return whether these are the fields of a run of the authors' code."""
    return bool(_MARKS & fields.keys())


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
    picked = _of_the_model(fields, ours)
    _warn_of_the_rest(set(fields) - set(ours) - _UNSERVED.keys() - _METHOD)
    return picked


def _of_the_model(fields: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """Return the fields of HyperFormerConfig that ``fields`` mean, with the authors' defaults."""
    method = _other_method(fields)
    _refuse(fields, _UNSERVED)
    picked = {name: value for name, value in fields.items() if name in ours}
    if fields.get("task_embeddings") is not None:
        picked["task_to_embeddings"] = _parallel_to_tasks(fields, "task_embeddings")
    if method == "adapters" and fields.get("adapters") is not None:
        picked["task_to_embeddings"] = _parallel_to_tasks(fields, "adapters")
    if method is None:
        return {**DEFAULTS, **picked}
    picked = {name: value for name, value in {**DEFAULTS, **picked}.items() if name in _READ_BY[method]}
    return picked | {"variant": method, "unique_hyper_net": None, "efficient_unique_hyper_net": None}


def _refuse(fields: Mapping[str, Any], unserved: Mapping[str, str]) -> None:
    for name, reason in unserved.items():
        if fields.get(name):
            raise ValueError(f"{name}={fields[name]!r} is not supported: it {reason}, and remove the field")


def _other_method(fields: Mapping[str, Any]) -> str | None:
    """Return the variant that is not a HyperFormer, or None. Raises ValueError for a method that is not known."""
    for name in ("train_adapters", "train_adapters_blocks"):
        if not isinstance(fields.get(name, True), bool):
            raise ValueError(f"{name} must be true or false, got {fields[name]!r}")
    # Only the configuration of a whole run has model_name_or_path. Its default of train_adapters is false.
    whole_run = "model_name_or_path" in fields
    if not fields.get("train_adapters", not whole_run):
        return "finetuning"
    kind = fields.get("adapter_config_name", "meta-adapter")
    if kind not in ("adapter", "meta-adapter"):
        raise ValueError(f"adapter_config_name must be 'adapter' or 'meta-adapter', got {kind!r}")
    return "adapters" if kind == "adapter" else None


def _parallel_to_tasks(fields: Mapping[str, Any], field: str) -> dict[str, str]:
    """Map each of ``tasks`` to its embedding or adapter, whose names ``field`` lists in the same order."""
    tasks, names = fields.get("tasks"), fields[field]
    if not isinstance(names, (list, tuple)) or not isinstance(tasks, (list, tuple)) or len(names) != len(tasks):
        what = "embedding" if field == "task_embeddings" else "adapter"
        raise ValueError(f"{field} must name an {what} for each of tasks, got {names!r} for the tasks {tasks!r}")
    mapping = dict(zip(tasks, names, strict=True))
    if fields.get("task_to_embeddings", mapping) not in (None, mapping):
        raise ValueError(
            f"task_to_embeddings={fields['task_to_embeddings']!r} and {field}={names!r} disagree: set only one"
        )
    return mapping


def _warn_of_the_rest(rest: set[str]) -> None:
    of_training = _SAME | RENAMED.keys() | _OBSOLETE.keys() | _SWITCHES.keys() | _UNSERVED_OF_A_RUN.keys()
    kinds = (
        ("they configure the authors' training, not the model", rest & of_training),
        ("no hypernetwork of the authors' code reads them", rest & _WITHOUT_EFFECT),
        ("unknown to the authors' code (misspelt?)", rest - of_training - _WITHOUT_EFFECT),
    )
    found = [f"{', '.join(sorted(names))}: {reason}" for reason, names in kinds if names]
    if found:
        warnings.warn(f"fields of the authors' configuration that are ignored: {'; '.join(found)}", stacklevel=4)


def translate_run(fields: Mapping[str, Any], ours: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Translate the authors' configuration of a run into today's flat fields; absent ones get the authors' defaults.

    Fields that are not the authors' are returned as they are.

    Args:
        fields: the authors' configuration.
        ours: names of the fields of HyperFormerConfig.

    Returns:
        Today's fields, and what became of each of the authors' that does not mean the same today.

    Raises:
        ValueError: a field has a value that is not supported here.
    """
    # The successors of these may not be null, as they are in a dump of the authors' arguments.
    fields = {n: v for n, v in fields.items() if v is not None or not n.startswith("per_gpu_")}
    _refuse(fields, _UNSERVED_OF_A_RUN)
    of_the_model = _of_the_model(fields, ours)
    variant = fields.get("variant") or of_the_model.get("variant") or _variant(of_the_model)
    theirs = _UNSERVED.keys() | _UNSERVED_OF_A_RUN.keys() | _METHOD | _WITHOUT_EFFECT | RENAMED.keys()
    theirs = theirs | _OBSOLETE.keys() | _SWITCHES.keys() | (set(ours) - {"tasks"})
    new = {name: value for name, value in fields.items() if name not in theirs}
    new |= {
        name: value for name, value in of_the_model.items() if name in ours and name != "tasks" and value is not None
    }
    for flag in ("unique_hyper_net", "efficient_unique_hyper_net"):
        new.pop(flag, None)
    if variant in ("hyperformer++", "hyperformer-shared"):
        new["conditional_layer_norm"] = True  # their code does so, whatever the field says
    new["variant"] = variant
    new.setdefault("recipe", BEFORE_RECIPES)
    notes = [f'the method is variant "{variant}"']
    notes += _renamed(fields, new)
    absent = {name: value for name, value in DEFAULTS_OF_A_RUN.items() if name not in new}
    if absent:
        new |= absent
        notes.append(f"absent fields have their defaults ({', '.join(f'{n} {v}' for n, v in absent.items())})")
    ignored = {name for name in _OBSOLETE.keys() & fields.keys() if fields[name] not in (None, False, "", -1)}
    notes += [f"{name} is ignored ({_OBSOLETE[name]})" for name in sorted(ignored)]
    unread = (_WITHOUT_EFFECT & fields.keys()) - ({"adapters"} if variant == "adapters" else set())
    if variant in _READ_BY:
        unread |= (set(ours) & fields.keys()) - _READ_BY[variant] - {"variant"}
    if unread:
        notes.append(f"{', '.join(sorted(unread))}: this method does not read them")
    return new, notes


def _variant(of_the_model: Mapping[str, Any]) -> str:
    """Return the variant that the authors' two flags select; the second takes precedence."""
    shared = "hyperformer-shared" if of_the_model["unique_hyper_net"] else "hyperformer"
    return "hyperformer++" if of_the_model["efficient_unique_hyper_net"] else shared


def _renamed(fields: Mapping[str, Any], new: dict[str, Any]) -> list[str]:
    """Add to ``new`` the fields of a run that are said otherwise today. Returns a note for each."""
    notes = []

    def set_field(name: str, value: Any, note: str) -> None:
        if new.setdefault(name, value) != value:
            raise ValueError(f"{note}, which has another value: {name}={new[name]!r}")
        notes.append(note)

    for old, now in RENAMED.items():
        if old in fields:
            value = fields[old]
            if old == "lr_scheduler":
                value = _SCHEDULES.get(value, value)
            if old in ("n_train", "n_val", "n_test") and value == -1:
                value = None  # all rows; the authors' code drops the last one
            set_field(now, value, f"{old} is now {now}")
    for switch, (name, value) in _SWITCHES.items():
        if fields.get(switch):
            set_field(name, value, f'{switch} is now {name} "{value}"')
    if new.pop("optimize_from_scratch_with_loading_model", False):
        # Their model_name_or_path then names a trained run, which knows its T5 here.
        set_field("init_from", new.pop("model_name_or_path", None), "the trained run to start from is now init_from")
    if new.get("tokenizer_name") is not None and new["tokenizer_name"] == fields.get("model_name_or_path"):
        del new["tokenizer_name"]  # so that another T5 comes with its own
    if fields.get("label_smoothing") and "loss_reduction" not in new:
        set_field("loss_reduction", "sum", 'the loss is summed over tokens, as theirs (loss_reduction "sum")')
    if "text_style" not in new:
        set_field("text_style", "official", 'texts are those of their code (text_style "official")')
    return notes
