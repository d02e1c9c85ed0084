"""One training step of a T5 with adapters, beside that of the bare T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.backends import use_backend
from hyperformer_fast.parameters import T5_SHAPES

BARE = "bare"
TASKS = 8


def steps(size: str, layers: int, B: int, L: int, backends: Sequence[str]) -> dict[str, Callable[[], object]]:
    """A step (forward, backward, AdamW) with each backend, and of the bare T5, whose own layer norms are then trained.

    Args:
        size: a T5 of the paper, with random weights; HyperFormer++ with a reduction factor of 32 and 8 tasks mixed.
        layers: blocks of the encoder and of the decoder, in place of the size's.
        B: samples.
        L: tokens of the input; the labels have a quarter of it.
    """
    return {name: step(size, layers, B, L, name) for name in (BARE, *backends)}


def step(size: str, layers: int, B: int, L: int, backend: str) -> Callable[[], object]:
    """The step of one backend, or of the bare T5."""
    return Step(size, layers, B, L, backend)


class Step:
    """A model, a batch and an optimiser; a call is one training step, and returns its loss.

    A call reads nothing from the device, and leaves no gradients, so that a CUDA graph can record it.

    Args:
        size, layers, B, L: as in :func:`steps`.
        backend: the backend to use, or ``BARE`` for the T5 without adapters.
        device: where everything lies.
        dtype: of the T5; the weights of the adapters' generators are float32.
    """

    def __init__(
        self,
        size: str,
        layers: int,
        B: int,
        L: int,
        backend: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.backend = "auto" if backend == BARE else backend
        shape = {**T5_SHAPES[size], "num_layers": layers}
        ids = torch.randint(1, 1000, (B, L), generator=torch.Generator().manual_seed(0)).to(device)
        self.batch = {"input_ids": ids, "labels": ids[:, : L // 4].contiguous()}
        torch.manual_seed(0)
        config = T5Config(vocab_size=1000, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False, **shape)
        with torch.device(device):
            model = T5ForConditionalGeneration(config).to(dtype)
            if backend == BARE:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_("layer_norm" in name)
            else:
                model = get_hyperformer_model(model, HyperFormerConfig(tasks=[f"task {i}" for i in range(TASKS)]))
                self.batch["task_index"] = torch.arange(B) % TASKS
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # a capturable optimiser keeps its count of steps on the device
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, capturable=device.startswith("cuda"))

    def backward(self) -> Tensor:
        """A forward and a backward; returns the loss."""
        with use_backend(self.backend):
            loss = self.model(**self.batch).loss
            loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss
