"""Greedy decoding with an exported model, in a process that has nothing of hyperformer_fast.

    hyperformer-fast export RUN_DIR --format onnx --output exported
    python examples/export_decode.py exported --task rte mrpc --text "a text for rte" "a text for mrpc"

It needs transformers for the tokenizer, PyTorch for --format torch and aoti, and onnxruntime for --format onnx.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def load(folder: Path) -> tuple[dict, Callable, Callable]:
    """The description of an exported folder, its encoder and its decoding step, which take and return NumPy arrays."""
    description = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    files = [folder / description["graphs"][name]["file"] for name in ("encoder", "decoder")]
    if description["format"] == "onnx":
        import onnxruntime

        def graph(file):
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            names = [each.name for each in session.get_inputs()]
            return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))
    else:
        import torch

        def graph(file):
            run = (
                torch._inductor.aoti_load_package(str(file))
                if description["format"] == "aoti"
                else torch.export.load(file).module()
            )

            @torch.no_grad()
            def called(*arrays):
                return [found.numpy() for found in run(*map(torch.from_numpy, arrays))]

            return called

    encoder, decoder = map(graph, files)
    return description, encoder, decoder


def decode(
    description: dict,
    encoder: Callable,
    decoder: Callable,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    tasks: Sequence[str],
    max_new_tokens: int | None = None,
) -> np.ndarray:
    """The tokens [B, at most max_new_tokens] of sources [B, L], each of the task of its own, behind its end padded.

    Without ``max_new_tokens`` a batch gets those of the task that may write most.
    """
    task_index = np.array([description["tasks"].index(task) for task in tasks])
    if max_new_tokens is None:
        max_new_tokens = max(description["generation"][task].get("max_new_tokens", 20) for task in tasks)
    samples, end, padding = len(tasks), description["eos_token_id"], description["pad_token_id"]
    cross_keys, cross_values = encoder(input_ids, attention_mask, task_index)
    blocks, _, heads, _, width = cross_keys.shape
    keys = np.zeros((blocks, samples, heads, max_new_tokens, width), cross_keys.dtype)
    values = np.zeros_like(keys)
    token = np.full(samples, description["decoder_start_token_id"])
    texts, running = [], np.ones(samples, dtype=bool)
    for step in range(max_new_tokens):
        position = np.full(samples, step)
        logits, keys[:, :, :, step], values[:, :, :, step] = decoder(
            token, position, attention_mask, task_index, keys, values, cross_keys, cross_values
        )
        token = np.where(running, logits.argmax(-1), padding)
        texts.append(token)
        running &= token != end
        if not running.any():
            break
    return np.stack(texts, 1)


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `hyperformer-fast export` wrote")
    parser.add_argument("--task", nargs="+", required=True, help="the task of each text, or one for all")
    parser.add_argument("--text", nargs="+", required=True, help="texts, as the task's model reads them")
    options = parser.parse_args(arguments)
    if len(options.task) not in (1, len(options.text)):
        parser.error(f"give one --task, or one for each of the {len(options.text)} texts")
    tasks = options.task * (len(options.text) // len(options.task))

    from transformers import AutoTokenizer

    description, encoder, decoder = load(options.folder)
    unknown = sorted({*tasks} - {*description["tasks"]})
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}: the folder has {', '.join(description['tasks'])}")
    tokenizer = AutoTokenizer.from_pretrained(options.folder / description["tokenizer"]["folder"])
    batch = tokenizer(options.text, padding=True, return_tensors="np")
    ids, mask = batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)
    texts = tokenizer.batch_decode(decode(description, encoder, decoder, ids, mask, tasks), skip_special_tokens=True)
    for task, text in zip(tasks, texts, strict=True):
        print(f"{task}: {text}")
    return texts


if __name__ == "__main__":
    main()
