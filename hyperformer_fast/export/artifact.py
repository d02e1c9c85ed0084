"""Write a model with all its tasks as two graphs, an encoder and a decoding step, that run without this library."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import fingerprint
from ..atomic import write_directory
from ..task_fitting import in_evaluation
from ..tiny import name_of
from .folder import check_replaceable
from .formats import DYNAMIC, FORMATS, GRAPHS, Run, expect_packages, trace
from .graphs import graphs_of
from .materialize import plain_copy
from .weights import packed_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..model import HyperFormerModel

#: The description beside the graphs, and the version of its fields.
DESCRIPTION = "export.json"
FORMAT_VERSION = 1

#: The largest difference of logits from the model's, over the largest logit, with which a graph is written.
_TOLERANCE = 1e-3

#: Samples, tokens of a source and of a target that the graphs are traced with.
_TRACED = (2, 3, 4)

#: The tokens that they are compared with, and the fewest and the most samples: within these one of each task, and one
#: without.
_COMPARED, _FEWEST, _MOST = (11, 6), 5, 64


def export_model(
    model: HyperFormerModel,
    folder: str | Path,
    format: str,
    tasks: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the encoder and one decoding step of ``model`` to ``folder``, with the weights of all tasks inside.

    The task of each sample is an input. What is written is loaded again, compared with the model, and appears in one
    step, in place of what an earlier export left there.

    Args:
        model: a model whose T5 is in float32 (or float64) on a CPU, with a decoder and a language model's head.
        folder: where to write.
        format: ``"torch"`` (``torch.export``), ``"onnx"`` or ``"aoti"`` (AOTInductor, compiled for this CPU).
        tasks: the tasks to export, in the order of their indices in the graphs; by default all of the model.
        tokenizer: the T5's, which is saved beside the graphs.
        generation: task -> arguments of ``generate``, which the description repeats.

    Returns:
        What ``export.json`` holds.

    Raises:
        ValueError: an unknown format or task; a model that cannot be exported.
        MissingPackage: a package that the format needs is not installed.
        RuntimeError: the graphs do not give the model's logits.
        OSError: the folder cannot be written, or has files that no earlier export wrote.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    expect_packages(format)
    check_replaceable(folder, DESCRIPTION, [*(f"{name}.*" for name in GRAPHS), "tokenizer"])
    config = model.hyperformer_config
    names = list(config.tasks if tasks is None else tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must name each task once, and at least one, got {names}")
    config.task_ids(names)
    _expect_exportable(model)
    t5 = plain_copy(model)
    packed = packed_weights(model, names)
    nets: Any = model.hypernetworks
    modules = dict(zip(GRAPHS, graphs_of(t5, nets, packed, config.non_linearity), strict=True))
    traced = _batch(t5.config, len(names), *_TRACED)
    inputs = {name: tuple(each) for name, each in zip(GRAPHS, _inputs(modules, traced), strict=True)}
    programs = {name: trace(module, name, inputs[name]) for name, module in modules.items()}
    chosen = FORMATS[format]
    with write_directory(folder) as partial:
        paths = {name: partial / f"{name}{chosen.suffix}" for name in GRAPHS}
        for name, program in programs.items():
            chosen.write(program, paths[name], name)
        difference = _difference(model, names, {name: chosen.load(path) for name, path in paths.items()})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial / "tokenizer")
        description = {
            "format": format,
            "format_version": FORMAT_VERSION,
            "tasks": names,
            **_tokens(t5.config),
            "generation": {name: dict((generation or {}).get(name, {})) for name in names},
            "tokenizer": None if tokenizer is None else {"folder": "tokenizer", "class": type(tokenizer).__name__},
            "graphs": {name: _graph(paths[name].name, name, t5) for name in GRAPHS},
            "cache": dict(zip(("blocks", "heads", "head_width"), _cache_sizes(t5))),
            "dtype": str(t5.dtype).removeprefix("torch."),
            "t5": {"name": name_of(t5), "class": type(t5).__name__, "sha256": _t5_digest(t5)},
            "largest_difference": difference,
            "versions": _versions(chosen.packages),
            "files": _files(partial),
        }
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def _expect_exportable(model: HyperFormerModel) -> None:
    t5: Any = model._base
    if not model.hypernetworks:
        raise ValueError(
            f"variant {model.hyperformer_config.variant!r} has no adapters, so that its T5 is a plain one: "
            "materialize(task).t5 is what any exporter of transformers' models takes"
        )
    if getattr(t5, "decoder", None) is None or getattr(t5, "lm_head", None) is None:
        raise ValueError(f"export needs a T5 with a decoder and lm_head, and {type(t5).__name__} has not both")
    for name, parameter in (*t5.named_parameters(), *model.hypernetworks.named_parameters()):
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.device.type != "cpu":
            raise ValueError(
                f"export needs a T5 in float32 on a CPU, and {name} is {parameter.dtype} on {parameter.device}: call "
                "model.float().cpu() first"
            )
        if not fingerprint.is_plain(parameter):
            raise ValueError(f"export needs a T5 in floating point, and {name} is quantised")


def _batch(config: Any, tasks: int, samples: int, source: int, target: int) -> dict[str, Tensor]:
    """Made-up sources and targets of all tasks in turn, and of none; one source is padded."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(samples, source, dtype=torch.long)
    mask[0, -1:] = 0
    return {
        "input_ids": torch.randint(config.vocab_size, (samples, source), generator=draw),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(config.vocab_size, (samples, target), generator=draw),
        "task_index": torch.arange(samples).add(1).remainder(tasks + 1) - 1,
    }


def _inputs(graphs: Mapping[str, Run | Any], batch: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of the encoder, and those of the first decoding step."""
    of_encoder = [batch[name] for name in GRAPHS["encoder"][0].names]
    with torch.no_grad():
        cross = graphs["encoder"](*of_encoder)
    tokens = batch["decoder_input_ids"]
    blocks, samples, heads, _, width = cross[0].shape
    cache = [torch.zeros(blocks, samples, heads, tokens.shape[1], width, dtype=cross[0].dtype) for _ in range(2)]
    start = torch.zeros(samples, dtype=torch.long)
    return of_encoder, [tokens[:, 0].clone(), start, batch["attention_mask"], batch["task_index"], *cache, *cross]


def decoded_logits(graphs: Mapping[str, Run | Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The logits [B, M, V] of given targets [B, M], token by token."""
    _, inputs = _inputs(graphs, batch)
    found = []
    with torch.no_grad():
        for step, token in enumerate(batch["decoder_input_ids"].unbind(1)):
            inputs[0], inputs[1] = token.contiguous(), torch.full_like(token, step)
            logits, key, value = graphs["decoder"](*inputs)
            inputs[4][:, :, :, step], inputs[5][:, :, :, step] = key, value
            found.append(logits)
    return torch.stack(found, 1)


def _difference(model: HyperFormerModel, tasks: Sequence[str], graphs: Mapping[str, Run]) -> float:
    """The largest difference of the graphs' logits from the model's, over the largest logit."""
    samples = min(max(len(tasks) + 1, _FEWEST), _MOST)
    batch = _batch(model.config, len(tasks), samples, *_COMPARED)
    inputs, index = {name: each for name, each in batch.items() if name != "task_index"}, batch["task_index"]
    named = [tasks[i] for i in index.tolist()]  # of -1, too, where it is not read
    with in_evaluation(model), torch.no_grad():
        # By names, because a model whose tasks were removed takes no index that meant another one.
        of_tasks = model(**inputs, task=named).logits
        of_none = model(**inputs, task_index=torch.full_like(index, -1)).logits
    expected = torch.where((index < 0).view(-1, 1, 1), of_none, of_tasks)
    difference = float((decoded_logits(graphs, batch) - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"the exported graphs do not give this model's logits, from which they differ by {difference:.2g} of the "
            "largest one, so nothing was written: something was added to the T5 that an export does not see"
        )
    return difference


def _cache_sizes(t5: Any) -> tuple[int, int, int]:
    attention = t5.decoder.block[0].layer[0].SelfAttention
    return len(t5.decoder.block), attention.n_heads, attention.key_value_proj_dim


def _graph(file: str, name: str, t5: Any) -> dict[str, Any]:
    """A graph's file, and the shapes of its inputs and outputs: numbers, and names of the open dimensions."""
    sizes = dict(zip(("N", "H", "k"), _cache_sizes(t5))) | {"V": t5.lm_head.weight.shape[0]}
    return {
        "file": file,
        **{
            side: {each: [DYNAMIC.get(of) or sizes[of] for of in shape] for each, shape in tensors.shapes.items()}
            for side, tensors in zip(("inputs", "outputs"), GRAPHS[name], strict=True)
        },
    }


def _tokens(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}


def _t5_digest(t5: Any) -> str:
    """One digest of all weights of a T5."""
    record = fingerprint.record(fingerprint.frozen(t5, ()))
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    from .. import __version__

    found = {"hyperformer_fast": __version__}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below ``folder``."""
    found = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found
