"""The T5s whose step is timed: bare, with the authors' adapters and with ours, fused or not."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence

import torch
from original_t5 import OriginalT5
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerConfig, fuse_t5, get_hyperformer_model, official
from hyperformer_fast.backends import use_backend
from hyperformer_fast.parameters import T5_SHAPES

BARE, ORIGINAL = "bare", "original"
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


@functools.lru_cache(maxsize=1)
def frozen_t5(
    size: str, layers: int, vocabulary: int, dropout: float, use_cache: bool, device: str, dtype: torch.dtype
) -> T5ForConditionalGeneration:
    """A T5 with random weights, from which all models of a case are copied."""
    shape = {**T5_SHAPES[size], "num_layers": layers}
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary, dropout_rate=dropout, decoder_start_token_id=0, use_cache=use_cache, **shape
    )
    with torch.device(device):
        model = T5ForConditionalGeneration(config).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer_norm" in name)
    return model


def shared_copy(t5: nn.Module) -> nn.Module:
    """A copy that has the very frozen parameters of ``t5``, and trained ones of its own."""
    return copy.deepcopy(t5, {id(p): p for p in t5.parameters() if not p.requires_grad})


class Step:
    """A model, a batch and an optimiser; a call is one training step, and returns its loss.

    A call reads nothing from the device, and leaves no gradients, so that a CUDA graph can record it.

    Args:
        size, layers, B, L: as in :func:`steps`.
        backend: the backend to use, ``BARE`` for the T5 without adapters, or ``ORIGINAL`` for the authors' adapters in
            it, with one task.
        device: where everything lies.
        dtype: of the T5; the weights of the adapters' generators are float32.
        fuse: what lies between the frozen products, as ``get_hyperformer_model`` takes it.
        variant: of HyperFormer.
        dropout: the T5's.
        targets: tokens of the labels (default: a quarter of L).
        vocabulary: the T5's.
        use_cache: whether the T5 keeps keys and values in a training step, as it does by default.
        fused_optimiser: AdamW in one kernel, as transformers' Trainer takes it by default.
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
        *,
        fuse: object = False,
        variant: str = "hyperformer++",
        dropout: float = 0.0,
        targets: int | None = None,
        vocabulary: int = 1000,
        use_cache: bool = False,
        fused_optimiser: bool = False,
    ):
        self.backend = "auto" if backend in (BARE, ORIGINAL) else backend
        ids = torch.randint(1, 1000, (B, L), generator=torch.Generator().manual_seed(0)).to(device)
        self.batch = {"input_ids": ids, "labels": ids[:, : L // 4 if targets is None else targets].contiguous()}
        t5 = shared_copy(frozen_t5(size, layers, vocabulary, dropout, use_cache, device, dtype))
        torch.manual_seed(0)
        with torch.device(device):
            self.model = self._model(t5, backend, variant, fuse).train()
        if backend not in (BARE, ORIGINAL):
            self.batch["task_index"] = torch.arange(B) % TASKS
            if fuse and self.model.loss_without_logits:
                # as our Trainer does
                self.batch["output_logits"] = False
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # a capturable optimiser keeps its count of steps on the device
        capturable = device.startswith("cuda")
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, capturable=capturable, fused=fused_optimiser or None)

    @staticmethod
    def _model(t5: nn.Module, backend: str, variant: str, fuse: object) -> nn.Module:
        if backend == BARE:
            return fuse_t5(t5) if fuse else t5
        config = HyperFormerConfig(tasks=[f"task{i}" for i in range(TASKS)], variant=variant, recipe="authors")
        ours = get_hyperformer_model(t5, config, fuse)
        if backend != ORIGINAL:
            return ours
        state = official.export(ours)
        model = OriginalT5(ours.unload(), config.tasks[0])
        model.load_official(state)
        return model

    def loss(self) -> Tensor:
        """A forward."""
        with use_backend(self.backend):
            return self.model(**self.batch).loss

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

    @torch.no_grad()
    def forward(self) -> Tensor:
        """A forward without gradients; returns the loss."""
        return self.loss()

    def generate(self, tokens: int) -> Tensor:
        """Decode ``tokens`` tokens greedily, no more and no fewer."""
        batch = {name: value for name, value in self.batch.items() if name in ("input_ids", "task_index")}
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
        with use_backend(self.backend):
            return self.model.generate(**batch, **settings)

    @contextlib.contextmanager
    def few(self, samples: int, task: int | None = None):
        """A batch of the first samples only, all of one task if one is given, while a ``with`` block runs."""
        whole = self.batch
        self.batch = {name: v[:samples] if isinstance(v, Tensor) else v for name, v in whole.items()}
        if task is not None and "task_index" in whole:
            self.batch["task_index"] = torch.full((samples,), task)
        try:
            yield self
        finally:
            self.batch = whole
