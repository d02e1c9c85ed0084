"""One of two processes under torchrun: run checks in order, and write how each ended to <folder>/checks.json.

A start takes seconds, so all checks share one. What one process of twice the batch computes is computed beside it, on
each process. After a check that fails no other runs, because the processes may no longer be in step.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.models.t5.modeling_t5 import T5Block

from hyperformer_fast.checkpoint import CheckpointError
from hyperformer_fast.sharding import is_sharded, whole
from hyperformer_fast.training.ranks import OtherProcessFailed, expect_all_sharded, on_first, shard_on_cpus, together
from support import rank_cases
from support.t5s import VARIANTS, batch, tiny_model

TASKS = ["mnli", "mnli", "stsb", "cola"]
LR, STEPS = 0.3, 2


def inputs_of(step: int, unequal: bool = True) -> dict[str, torch.Tensor]:
    """A batch of 4, whose second half (the second process's) has fewer labels than its first."""
    inputs = batch(seed=step, M=6)
    if unequal:
        inputs["labels"][2:, 2:] = -100
    return inputs


def half(inputs, rank: int):
    return {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}


def expected(model, micro_batches: int = 1, smoothing: float = 0.0):
    """The parameters after STEPS steps of SGD on whole batches, in this process alone."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in range(STEPS):
        parts = [inputs_of(step * micro_batches + i) for i in range(micro_batches)]
        count = sum((part["labels"] != -100).sum() for part in parts)
        for part in parts:
            logits = model(**part, task=TASKS).logits
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part["labels"].flatten(), reduction="sum", label_smoothing=smoothing
            ).div(count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def values(model):
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def compare(found, wanted, rtol=1e-7, atol=1e-9):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def train_in_two(model, adapted, rank: int, micro_batches: int = 1, quiet=None):
    """What :func:`expected` does, with half of each batch here: the mean of gradients is that of the sum's share."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in range(STEPS):
        parts = [inputs_of(step * micro_batches + i) for i in range(micro_batches)]
        count = sum((part["labels"] != -100).sum() for part in parts)
        for i, part in enumerate(parts):
            with quiet() if quiet is not None and i + 1 < micro_batches else contextlib.nullcontext():
                loss = model(**half(part, rank), task=TASKS[2 * rank : 2 * rank + 2], num_items_in_batch=count).loss
                (2 * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(adapted)


def shard(model, units=()):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in [m for m in model.modules() if isinstance(m, T5Block)] + list(units):
        fully_shard(module, mesh=mesh)
    # Tied embeddings stay with the root.
    return fully_shard(model, mesh=mesh)


def check_ddp_of_every_variant(rank: int, folder: Path) -> None:
    """No unused parameters, though each process has its own tasks; a static graph; accumulation without sync."""
    only_norms = {"train_adapters_blocks": False, "conditional_layer_norm": True}
    only_embeddings = {"freeze_model_but_task_embeddings": True}
    variants = [{"variant": variant} for variant in (*VARIANTS, "adapters", "finetuning")]
    for fields in (*variants, only_norms, only_embeddings, {"recipe": "default"}):
        for static in (False, True) if fields in variants[:1] else (False,):
            model = tiny_model(**fields).train()
            wrapped = DistributedDataParallel(model, find_unused_parameters=False, static_graph=static)
            quiet = None if static else wrapped.no_sync
            found = train_in_two(wrapped, model, rank, 2, quiet)
            compare(found, expected(tiny_model(**fields).train(), 2))


def check_fsdp2_of_every_variant(rank: int, folder: Path) -> None:
    """T5 sharded by block, the adapters' part in a unit of its own or with what is left of the T5."""
    for variant in (*VARIANTS, "adapters", "finetuning"):
        # Both are alike in all variants.
        checkpointing = apart = variant in ("hyperformer++", "adapters")
        model = tiny_model(variant, unfreeze_lm_head=True, recipe="default").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        shard(model, [*model.hypernetworks.values(), model.task_embeddings] if apart else ())
        assert all(is_sharded(p) for p in model.parameters())
        found = train_in_two(model, model, rank)
        compare(found, expected(tiny_model(variant, unfreeze_lm_head=True, recipe="default").train()))


def check_fsdp2_must_not_ignore_what_is_trained(rank: int, folder: Path) -> None:
    model = tiny_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh, ignored_params=set(model.task_embeddings.parameters()))
    try:
        expect_all_sharded(model)
        raise AssertionError("copies of the task embeddings would have gone different ways")
    except ValueError as error:
        assert "FSDP2 was told to ignore task_embeddings." in str(error), error
    expect_all_sharded(shard(tiny_model()))


def check_fsdp2_generates(rank: int, folder: Path) -> None:
    """As many tokens as each process asks for, without one waiting for the other."""
    prompt = {name: half(inputs_of(0), rank)[name] for name in ("input_ids", "attention_mask")}
    for options in ({"task": "stsb", "max_new_tokens": 2 + 3 * rank}, {"task": "mnli", "max_new_tokens": 4}):
        for variant in ("hyperformer++", "finetuning"):
            model, plain = shard(tiny_model(variant).eval()), tiny_model(variant).eval()
            found, wanted = model.generate(**prompt, **options), plain.generate(**prompt, **options)
            assert torch.equal(found[:, : wanted.shape[1]], wanted)
            register_fsdp_forward_method(model, "generate")  # as the Trainer of transformers 5 does
            assert torch.equal(model.generate(**prompt, **options), found)


def check_fsdp2_saves_and_loads(rank: int, folder: Path) -> None:
    """A sharded model's checkpoint is the plain one's, digests and all, and loads on a sharded one."""
    sharded, plain = shard(tiny_model(unfreeze_lm_head=True)), tiny_model(unfreeze_lm_head=True)
    sharded.save_pretrained(folder / "sharded", is_main_process=rank == 0)
    if rank == 0:
        plain.save_pretrained(folder / "plain")
        found, wanted = (load_file(folder / name / "model.safetensors") for name in ("sharded", "plain"))
        compare(found, wanted, rtol=0, atol=0)
    dist.barrier()
    other = tiny_model(unfreeze_lm_head=True)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    shard(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_weights(folder / "sharded")
    compare(values(other), values(plain), rtol=0, atol=0)
    with torch.no_grad():
        foreign = tiny_model(unfreeze_lm_head=True)
        foreign.t5.encoder.block[0].layer[0].SelfAttention.q.weight[0, 0] += 1
    try:
        shard(foreign).load_weights(folder / "sharded")
        raise AssertionError("another T5's checkpoint was loaded")
    except CheckpointError as error:
        assert "another T5" in str(error), error


class InOrder(Seq2SeqTrainer):
    """The stock Trainer, taking the rows in their order, and sharding on CPUs as ours does."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def stock_trainer(folder: Path, model, **arguments) -> InOrder:
    rank_cases.forget_accelerator()
    rows = []
    for step in range(2 * STEPS):
        inputs = inputs_of(step)
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        rows += [
            {name: value[i] for name, value in inputs.items()}
            | {"task_index": model.hyperformer_config.tasks.index(TASKS[i])}
            for i in range(4)
        ]
    fields = {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "optim": "sgd", "learning_rate": LR,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no",
        "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    return InOrder(model, Seq2SeqTrainingArguments(str(folder / "stock"), **fields | arguments), train_dataset=rows)


def check_the_stock_trainer(rank: int, folder: Path) -> None:
    """DDP under the stock Trainer, accumulating, with label smoothing, on targets of unequal length."""
    for smoothing in (0.0, 0.1):
        model = tiny_model()
        if not model.accepts_loss_kwargs:
            return
        trainer = stock_trainer(folder, model, gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
        assert trainer.args.world_size == 2
        trainer.train()
        # transformers smooths in float32
        compare(values(model), expected(tiny_model().train(), 2, smoothing), rtol=1e-5, atol=1e-6)


def check_the_stock_trainer_with_fsdp2(rank: int, folder: Path) -> None:
    """accelerate's FSDP2, with and without loading on one process only."""
    if int(__import__("transformers").__version__.split(".")[0]) < 5:
        return  # its arguments cannot ask for version 2
    for efficient in (False, True):
        config = {"fsdp_version": 2, "cpu_ram_efficient_loading": efficient, "state_dict_type": "FULL_STATE_DICT"}
        changes = {"unfreeze_lm_head": True, "normalize_embeddings": efficient}  # whose state dict has a mark
        model = tiny_model(**changes)
        trainer = stock_trainer(folder, model, fsdp=True, fsdp_config=config)
        trainer.train()
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        assert is_sharded(adapted.t5.encoder.block[0].layer[0].SelfAttention.q.weight)
        compare(values(adapted), expected(tiny_model(**changes).train()))
        assert any(name.endswith("normalized._extra_state") for name in adapted.state_dict()) == efficient


def check_our_trainer(rank: int, folder: Path) -> None:
    """The test compares what this writes with what it computes in one process."""
    for name in rank_cases.CASES:
        trainer = rank_cases.run_case(folder / "two" / name, name, 2)
        assert any(map(is_sharded, trainer.model.parameters())) == name.startswith("fsdp")
        torch.save(rank_cases.result(trainer), folder / f"{name} {rank}.pt")


def check_fsdp2_resumes_from_one_process(rank: int, folder: Path) -> None:
    trainer = rank_cases.run_case(folder / "resumed", "fsdp", 2, resume=str(folder / "one" / "fsdp" / "checkpoint-2"))
    torch.save(rank_cases.result(trainer), folder / f"resumed {rank}.pt")


def check_that_none_waits_for_one_that_fails(rank: int, folder: Path) -> None:
    def fail(where: int) -> int:
        if rank == where:
            raise KeyError("bad row")
        return rank

    for where in (0, 1):
        try:
            together(lambda where=where: fail(where))
            raise AssertionError("nothing was raised")
        except KeyError:
            assert rank == where
        except OtherProcessFailed as error:
            assert rank != where and f"process {where} failed: KeyError: 'bad row'" in str(error), error
    assert together(lambda: rank) == rank and on_first(lambda: rank) == 0
    try:
        on_first(lambda: fail(0))
        raise AssertionError("nothing was raised")
    except KeyError:
        pass


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, ended = dist.get_rank(), {}
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        try:
            check(rank, folder)
            ended[name] = ""
        except BaseException:
            ended[name] = traceback.format_exc()
            break
    (folder / f"checks{rank}.json").write_text(json.dumps(ended))
    # gloo's destructors, with a DDP model alive, have hung at a plain exit (torch 2.13)
    os._exit(0)


if __name__ == "__main__":
    main()
