"""One training step of a T5 with adapters, beside that of the bare T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.backends import use_backend
from hyperformer_fast.parameters import T5_SHAPES

BARE = "bare"
TASKS = 8


def steps(size: str, layers: int, B: int, L: int, backends: Sequence[str]) -> dict[str, Callable[[], None]]:
    """A step (forward, backward, AdamW) with each backend, and of the bare T5, whose own layer norms are then trained.

    Args:
        size: a T5 of the paper, with random weights; HyperFormer++ with a reduction factor of 32 and 8 tasks mixed.
        layers: blocks of the encoder and of the decoder, in place of the size's.
        B: samples.
        L: tokens of the input; the labels have a quarter of it.
    """
    return {name: step(size, layers, B, L, name) for name in (BARE, *backends)}


def step(size: str, layers: int, B: int, L: int, backend: str) -> Callable[[], None]:
    """The step of one backend, or of the bare T5."""
    shape = {**T5_SHAPES[size], "num_layers": layers}
    ids = torch.randint(1, 1000, (B, L), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids[:, : L // 4].contiguous()}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=1000, dropout_rate=0.0, decoder_start_token_id=0, **shape))
    if backend == BARE:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer_norm" in name)
    else:
        model = get_hyperformer_model(model, HyperFormerConfig(tasks=[f"task {i}" for i in range(TASKS)]))
        batch["task_index"] = torch.arange(B) % TASKS
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        with use_backend("auto" if backend == BARE else backend):
            model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return run
