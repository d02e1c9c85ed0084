"""A run's arguments: from flags, JSON and YAML to the Trainer and back, older names, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Seq2SeqTrainingArguments

import hyperformer_fast
from hyperformer_fast import HyperFormerConfig
from hyperformer_fast.cli import main
from hyperformer_fast.training import HyperFormerTrainingArguments, RunArguments, RunConfig
from hyperformer_fast.training import arguments as arguments_module
from hyperformer_fast.training.arguments import KNOWN_FIELDS, RunConfigError
from hyperformer_fast.training.parser import make_parser
from hyperformer_fast.training.presets import FAN_IN_RATE, FIRST_RELEASE_EMBEDDED, PRESETS

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]

#: The arguments of a run.json of version 0.1.0.
OLD_RUN = {
    "model": None, "data_dir": None, "tasks": ["cola"], "output_dir": "somewhere", "steps": 1200,
    "hyperformer": {"reduction_factor": 4}, "batch_size": 32, "gradient_accumulation": 2, "learning_rate": 1e-3,
    "warmup_steps": 50, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "label_smoothing": 0.1,
    "temperature": 10.0, "max_source_length": 128, "max_train_rows": 99, "max_eval_rows": 60, "eval_batch_size": 128,
    "eval_steps": 300, "eval_rows": 100, "keep_best": False, "logging_steps": 10, "save_steps": 0,
    "save_total_limit": 2, "seed": 42, "gradient_checkpointing": True, "bf16": False,
}  # fmt: skip
TODAY = {
    "recipe": "authors", "model_name_or_path": None, "data_dir": None, "tasks": ["cola"], "output_dir": "somewhere",
    "reduction_factor": 4,
    "max_steps": 1200, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
    "warmup_steps": 50, "lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.0, "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.1, "temperature": 10.0, "max_source_length": 128, "max_train_samples": 99,
    "max_predict_samples": 60, "max_eval_samples": 60, "per_device_eval_batch_size": 128, "eval_strategy": "steps",
    "eval_steps": 300, "load_best_model_at_end": False, "logging_steps": 10, "save_strategy": "no",
    "save_total_limit": 2, "seed": 42, "gradient_checkpointing": True, "bf16": False,
}  # fmt: skip


def quietly(make, *given, **named):
    """The result, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make(*given, **named)


def test_every_argument_of_transformers_is_a_field_and_a_flag():
    names = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    flags = make_parser()._option_string_actions
    assert names <= KNOWN_FIELDS.keys() and all(f"--{name}" in flags for name in KNOWN_FIELDS)
    assert all(f"--{name.replace('_', '-')}" in flags for name in KNOWN_FIELDS)
    ours = [{f.name for f in dataclasses.fields(kind)} for kind in arguments_module._GROUPS.values()]
    twice = {name for i, group in enumerate(ours) for other in ours[i + 1 :] for name in group & other}
    assert twice == {"data_seed"}  # whose place is with the data; see the parser
    for field in dataclasses.fields(HyperFormerConfig):
        assert field.name in KNOWN_FIELDS


def test_arguments_of_hugging_face_reach_the_trainer(tmp_path):
    flags = "--report_to tensorboard --optim adafactor --bf16 --use_cpu --torch_compile --torch_compile_backend eager"
    flags += " --num_train_epochs 2 --eval_strategy epoch --save_strategy epoch --load_best_model_at_end"
    flags += " --early_stopping_patience 3 --gradient_checkpointing --warmup-steps 7 --debug underflow_overflow"
    flags += f" --adam_beta2 0.98 --output-dir {tmp_path} --hub_model_id me/it --dataloader_num_workers 1 --no-do_eval"
    run = RunArguments.from_args(flags.split())
    training = run.training
    assert isinstance(training, HyperFormerTrainingArguments) and training.report_to == ["tensorboard"]
    assert (training.optim, training.lr_scheduler_type, training.eval_strategy) == ("adafactor", "linear", "epoch")
    assert training.bf16 and training.use_cpu and training.torch_compile and training.torch_compile_backend == "eager"
    assert (training.num_train_epochs, training.max_steps, training.warmup_steps) == (2, -1, 7)
    assert (training.metric_for_best_model, training.greater_is_better) == ("average_metrics", True)
    assert getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing
    assert [option.value for option in training.debug] == ["underflow_overflow"]
    (stop,) = run.callbacks()
    assert stop.early_stopping_patience == 3
    assert RunArguments.from_dict({"output_dir": str(tmp_path)}).callbacks() == []


@pytest.mark.parametrize(
    ("name", "value"), [("fsdp", "full_shard"), ("deepspeed", "ds.json"), ("fsdp_config", "f.json")]
)
def test_what_needs_several_processes_is_passed_on(monkeypatch, name, value):
    made = {}
    monkeypatch.setattr(arguments_module, "_make_training", lambda fields: made.update(fields) or _plain_training())
    RunArguments.from_args([f"--{name}", value])
    assert made[name] == value


def _plain_training():
    return HyperFormerTrainingArguments(use_cpu=True)


def test_what_the_trainer_refuses_is_one_message(tmp_path):
    with pytest.raises(RunConfigError, match="the Trainer refuses .*At most one of fp16 and bf16"):
        RunArguments.from_dict({"output_dir": str(tmp_path), "bf16": True, "fp16": True})


@pytest.mark.parametrize("there", [False, True])
def test_torchrun_without_an_accelerator_chooses_cpu_and_gloo_by_itself(monkeypatch, there):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(Seq2SeqTrainingArguments, "__post_init__", lambda self: None)  # it would wait for rank 1
    monkeypatch.setattr(Seq2SeqTrainingArguments, "n_gpu", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = HyperFormerTrainingArguments()
    assert (made.use_cpu, made.ddp_backend) == ((False, None) if there else (True, "gloo"))
    assert HyperFormerTrainingArguments(ddp_backend="mpi").ddp_backend == "mpi"


def test_several_gpus_in_one_process_are_not_used_by_data_parallel(monkeypatch):
    monkeypatch.setattr(Seq2SeqTrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 4))
    assert HyperFormerTrainingArguments().n_gpu == 1


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    fields = {
        "variant": "hyperformer",
        "learning_rate": 5e-4,
        "eval_strategy": "no",
        "tasks": ["a"],
        "eval_tasks": ["a"],
    }
    as_json, as_yaml = tmp_path / "run.json", tmp_path / "run.yaml"
    as_json.write_text(json.dumps(fields | {"max_steps": 9}))
    as_yaml.write_text(
        "variant: hyperformer\nlearning_rate: 5e-4\neval_strategy: no\nmax_steps: 9\ntasks: [a]\neval_tasks: [a]\n"
    )
    flags = ["--max_steps", "8", "--seed=3", "--output_dir", str(tmp_path)]
    runs = [RunArguments.from_args([str(path), *flags]) for path in (as_json, as_yaml)]
    assert runs[0].to_dict() == runs[1].to_dict() == runs[0].given
    assert runs[0].given == fields | {"max_steps": 8, "seed": 3, "output_dir": str(tmp_path)}
    for flags in (["--tasks", "b", "c"], ["--bf16"], ["--debug"]):
        at_the_end = RunArguments.from_args([*flags, str(as_json)])
        assert at_the_end.given.items() >= {"max_steps": 9, "variant": "hyperformer"}.items()
    assert RunArguments.from_args([str(as_json), "--tasks", "b,c"]).given.keys() & {"eval_tasks", "tasks"} == {"tasks"}
    assert RunArguments.from_args([str(as_json), "--num_train_epochs", "2"]).training.max_steps == -1
    assert RunArguments.from_args([str(as_json), "--eval_steps", "2"]).training.eval_strategy == "steps"
    by_flag = RunArguments.from_args([str(as_json), "--unique_hyper_net"]).hyperformer_config(["a"])
    assert by_flag.variant == "hyperformer-shared"


def test_the_demo_is_chosen_for_the_embedded_t5_without_a_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    demo = RunArguments.from_args([])
    assert demo.to_dict() == {"preset": "demo", **PRESETS["demo"]} and demo.given == {"preset": "demo"}
    assert RunArguments.from_dict(demo.to_dict()).to_dict() == demo.to_dict()
    for argv in ([str(path)], ["--model_name_or_path", "t5"], ["--init_from", "there"], ["--preset", "none"]):
        assert RunArguments.from_args(argv).training.max_steps == -1
    for argv in (["--preset", "demo", "--model_name_or_path", "t5"], ["--model_name_or_path", "embedded"]):
        assert RunArguments.from_args(argv).training.max_steps == PRESETS["demo"]["max_steps"]
    assert RunArguments.from_args(["--num_train_epochs", "1"]).training.max_steps == -1
    assert RunArguments.from_args(["--learning_rate", "3e-4"]).to_dict()["learning_rate"] == 3e-4
    assert RunArguments.from_dict({}).to_dict() == {"learning_rate": FAN_IN_RATE}


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({}, 3e-3),
        ({"recipe": "authors"}, 1e-3),
        ({"learning_rate_rule": "uniform"}, 1e-3),
        ({"variant": "finetuning"}, 1e-3),
        ({"recipe": "authors", "learning_rate_rule": "fan_in"}, 3e-3),
        ({"recipe": "authors", "learning_rate": 3e-4}, 3e-4),
    ],
)
def test_the_preset_has_a_rate_for_each_rule(given, rate):
    demo = RunArguments.from_dict({"preset": "demo"} | given)
    assert demo.training.learning_rate == rate
    assert RunArguments.from_dict(demo.to_dict()).training.learning_rate == rate


def test_what_is_saved_loads_as_the_same_run_anywhere(tmp_path):
    given = {"tasks": ["a"], "variant": "hyperformer", "max_steps": 5, "learning_rate": 3e-4, "seed": 1}
    given |= {"output_dir": str(tmp_path), "lr_scheduler_type": "cosine", "report_to": "tensorboard", "use_cpu": True}
    starts = {"token": "secret", "hub_token": "secret", "overwrite_output_dir": True}
    run = RunArguments.from_dict(given | starts)
    saved = json.loads(json.dumps(run.to_dict()))
    assert saved == given
    assert RunArguments.from_dict(saved).to_dict() == saved
    read = RunArguments.from_dict(saved | {"argument_of_another_version": 1}, for_training=False)
    assert read.to_dict() == saved and read.training.max_steps == -1 and read.training.seed == 1
    run.training.max_steps, run.data.max_train_samples = 7, 3
    assert run.to_dict() == saved | {"max_steps": 7, "max_train_samples": 3}
    assert RunArguments().to_dict() == {}
    assert RunArguments(training=HyperFormerTrainingArguments(seed=9)).to_dict() == {"seed": 9}


def test_paths_no_longer_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "t5").mkdir()
    run = RunArguments.from_dict({"data_dir": "data", "model_name_or_path": "t5", "output_dir": "out"}).located()
    assert run.to_dict() == {
        "data_dir": f"{tmp_path}/data",
        "model_name_or_path": f"{tmp_path}/t5",
        "output_dir": f"{tmp_path}/out",
        "learning_rate": FAN_IN_RATE,
    }
    hub = RunArguments.from_dict({"data_dir": "hub:glue", "model_name_or_path": "t5-base"}).located()
    assert (hub.data.data_dir, hub.model.model_name_or_path) == ("hub:glue", "t5-base")


def test_names_of_the_first_release_mean_what_they_meant():
    with pytest.warns(DeprecationWarning, match="steps is now max_steps; batch_size is now per_device_train") as caught:
        run = RunArguments.from_dict(OLD_RUN)
    assert {warning.filename for warning in caught} == {__file__}
    assert run.given == TODAY and run.hyperformer_config(["a"]).reduction_factor == 4
    assert quietly(RunArguments.from_dict, OLD_RUN, for_training=False).to_dict() == run.to_dict()
    with pytest.warns(DeprecationWarning):
        part = RunArguments.from_dict(
            {"model": "t5-base", "steps": 5, "keep_best": True, "eval_steps": 3, "save_steps": 4}
        )
    assert part.given.items() >= {"learning_rate": 1e-3, "max_steps": 5, "warmup_steps": 100, "save_steps": 6}.items()
    with pytest.warns(DeprecationWarning):
        part = RunArguments.from_dict({"steps": 5, "keep_best": True, "save_steps": 0})
    assert part.given["save_strategy"] == "best" and part.given["task_hidden_dim"] == 32


def test_the_class_of_the_first_release_makes_todays(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(OLD_RUN))
    with pytest.warns(DeprecationWarning, match="RunConfig is now RunArguments") as caught:
        made = [RunConfig(**OLD_RUN), RunConfig.from_dict(OLD_RUN), RunConfig.load(tmp_path / "run.json", {"seed": 5})]
        demo, named = RunConfig(), RunConfig(model="t5-base", seed=1)
    assert len(caught) == 5 and {warning.filename for warning in caught} == {__file__}
    assert made[0].given == made[1].given == TODAY and made[2].given == TODAY | {"seed": 5}
    assert demo.to_dict() == FIRST_RELEASE_EMBEDDED | {"recipe": "authors"}
    assert (named.training.max_steps, named.training.warmup_steps, named.adapters.reduction_factor) == (2000, 100, None)


def test_flags_of_the_first_release_warn_and_work(tmp_path, capsys):
    flags = "--steps 4 --batch-size 3 --eval_steps 0 --hyperformer task_hidden_dim=5 variant=hyperformer".split()
    flags += ["--overwrite", "--no-keep-best", "--max-eval-rows", "7", "--schedule", "constant", "--output-dir", "x"]
    with pytest.warns(DeprecationWarning, match="steps is now max_steps;.* overwrite is now overwrite_output_dir"):
        run = RunArguments.from_args(flags)
    assert run.given.items() >= {
        "max_steps": 4, "per_device_train_batch_size": 3, "eval_strategy": "no", "task_hidden_dim": 5,
        "variant": "hyperformer", "overwrite_output_dir": True, "load_best_model_at_end": False,
        "max_predict_samples": 7, "max_eval_samples": 7, "lr_scheduler_type": "constant_with_warmup",
    }.items()  # fmt: skip
    assert run.training.learning_rate == PRESETS["demo"]["learning_rate"]
    # The command says it as a line of its own, and does not point into its code.
    assert main(["train", "--steps", "4", "--data-dir", str(tmp_path / "nowhere")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "hyperformer-fast: warning: arguments have new names: steps is now max_steps"
    assert second.endswith("nowhere' is not a directory")


REFUSED = {
    "an unknown field": ({"learning_rat": 1}, "unknown field 'learning_rat'; did you mean 'learning_rate'?"),
    "a number as text": ({"max_steps": "3"}, "max_steps must be a whole number, got '3'"),
    "a truth as number": ({"bf16": 1}, "bf16 must be true or false, got 1"),
    "not finite": ({"learning_rate": float("nan")}, "learning_rate must be a number, got nan"),
    "no choice of transformers": ({"eval_strategy": "never"}, "eval_strategy must be one of no, steps, epoch, got"),
    "no choice of ours": ({"text_style": "theirs"}, "text_style must be one of default, official, got 'theirs'"),
    "too small": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
    "no steps": ({"max_steps": 0}, "max_steps must be at least 1, or -1 to train num_train_epochs, got 0"),
    "not above zero": ({"temperature": 0}, "temperature must be above 0, got 0"),
    "too much smoothing": ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be below 1, got 1.0"),
    "a task twice": ({"tasks": ["a", "b", "a"]}, "tasks must be unique, got a more than once"),
    "no tasks": ({"tasks": []}, "tasks must name at least one task"),
    "tasks as text": ({"tasks": "cola"}, "tasks must be a list of names or null, got 'cola'"),
    "a path as task": ({"eval_tasks": ["../x"]}, "eval_tasks: the name '../x' has '/', which no task may have"),
    "a blank task": ({"tasks": [" "]}, "tasks: ' ' cannot be the name of a task"),
    "an unknown preset": ({"preset": "dem"}, "preset must be one of demo, got 'dem'; did you mean 'demo'?"),
    "an unknown method": ({"variant": "lora"}, "variant must be one of hyperformer++,"),
    "an unknown activation": ({"non_linearity": "tanh"}, "non_linearity"),
    "flags that disagree": ({"variant": "hyperformer", "unique_hyper_net": True}, "variant='hyperformer' stands for"),
    "continued and replaced": (
        {"resume_from_checkpoint": True, "overwrite_output_dir": True},
        "resume_from_checkpoint and overwrite_output_dir exclude each other",
    ),
    "the best of nothing": ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations while"),
    "patience for nothing": ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
    "the best checkpoint of none": ({"save_strategy": "best"}, 'save_strategy "best" needs evaluations while training'),
    "not to train": ({"do_train": False}, "do_train is false"),
    "absent data": ({"data_dir": "/nowhere"}, "data_dir '/nowhere' is not a directory"),
    "an absent task file": ({"task_file": "/nowhere"}, "task_file '/nowhere' is not a file"),
    "both names": ({"steps": 3, "max_steps": 4}, "steps is the old name of max_steps: give only one of them"),
    "tasks of the adapters": ({"hyperformer": {"tasks": ["a"]}}, "must not have the field 'tasks'"),
    "an unknown adapter field": ({"hyperformer": {"reduction": 3}}, "unknown field 'reduction'"),
    "an old schedule": ({"schedule": "step"}, "schedule must be one of linear, cosine, constant, got 'step'"),
    "best without evaluation": ({"keep_best": True, "eval_steps": 0}, "keep_best needs evaluations"),
    "embeddings that are no object": ({"task_to_embeddings": "[1]"}, "task_to_embeddings must be a JSON object"),
    "a start from itself": (
        {"init_from": "/", "output_dir": "/", "overwrite_output_dir": True},
        "init_from '/' lies in output_dir '/', which overwrite_output_dir would clear",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_named_with_its_file_and_nothing_is_written(tmp_path, capsys, what):
    fields, message = REFUSED[what]
    with pytest.raises(RunConfigError) as refused:
        RunArguments.from_dict(fields)
    assert message in str(refused.value)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"output_dir": str(tmp_path / "run"), **fields}))
    assert main(["train", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("hyperformer-fast: error:") == 1
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    path = tmp_path / "run.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "must be an object of fields, got list"),
        ('{"max_stepz": 3}', "max_stepz"),
    ):
        path.write_text(content)
        with pytest.raises(RunConfigError, match=f"run.json: .*{message}"):
            RunArguments.from_args([str(path)])
    for content in ("a: [", "seed: 1\nseed: 2"):
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(RunConfigError, match="run.yaml: not YAML: .*(expected|stands twice)"):
            RunArguments.from_args([str(tmp_path / "run.yaml")])
    with pytest.raises(RunConfigError, match="must be an object of fields, got list"):
        RunArguments.from_dict([])
