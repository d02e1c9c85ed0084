"""The T5 that is pretrained, with linear readers that are dropped afterwards, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hyperformer_fast.checkpoint import recover_directory, write_directory
from hyperformer_fast.fusion import fuse_t5

from .objectives import IGNORED, NUMBERS, Example
from .tokenizer import TOKENIZER_FIELDS

CONFIG = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
TIED = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


class Pretraining(nn.Module):
    """The T5, and linear readers of its encoder.

    At each word's last piece they read whether the other sentence of a pair has the word, and whether it was altered;
    at the end token whether any word was altered, how many words are new in the second sentence of a pair, the first
    piece of the target, and all pieces of a sentence that is to be foretold. The decoder's few pieces of target say
    little about each word of the source, and nothing about what it was not asked.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.t5 = T5ForConditionalGeneration(T5Config(vocab_size=vocab_size, **CONFIG))
        config = self.t5.config
        reader = lambda n: nn.Sequential(nn.LayerNorm(config.d_model), nn.Linear(config.d_model, n))  # noqa: E731
        self.shared, self.altered = reader(2), reader(2)
        self.changed, self.new = reader(2), reader(len(NUMBERS))
        self.answer, self.following = reader(config.vocab_size), reader(config.vocab_size)
        self._look_for_likes()
        fuse_t5(self.t5)  # a fifth faster on one thread

    @torch.no_grad()
    def _look_for_likes(self) -> None:
        """Initialise the last head of the upper encoder layers to attend to similar positions far away.

        Keys equal to queries, up to a factor, make every position attend to what resembles it; the bias makes what is
        near less likely. From a random start a T5 of this size learns only slowly which words two sentences share.
        """
        config = self.t5.config
        width = config.d_kv
        for block in self.t5.encoder.block[config.num_layers // 2 :]:
            attention = block.layer[0].SelfAttention
            attention.q.weight[-width:] = attention.k.weight[-width:] / 2
        bias = self.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        half = config.relative_attention_num_buckets // 2
        # the first four of each direction's 16 buckets are for distances below 4
        bias.view(2, half, -1)[:, :4, -1] = -5.0

    def forward(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        source = pad([[*example.source, 1] for example in examples], 0)
        labels = pad([[*example.target, 1] for example in examples], IGNORED)
        out = self.t5(input_ids=source, attention_mask=(source != 0).long(), labels=labels)
        states = out.encoder_last_hidden_state
        losses = {"text": out.loss}
        last = states[range(len(examples)), [len(example.source) for example in examples]]
        losses["answer"] = cross_entropy(self.answer(last), labels[:, 0])
        following = [(row, piece) for row, example in enumerate(examples) for piece in example.following]
        if following:
            which, pieces = torch.tensor(following).T
            losses["following"] = cross_entropy(self.following(last)[which], pieces)
        rows = torch.tensor([row for row, example in enumerate(examples) for _ in example.ends])
        ends = torch.tensor([end for example in examples for end in example.ends])
        for name, reader in (("shared", self.shared), ("altered", self.altered)):
            flags = torch.tensor([flag for example in examples for flag in getattr(example, name)])
            _add(losses, name, reader, states[rows, ends], flags)
        for name, reader in (("changed", self.changed), ("new", self.new)):
            _add(losses, name, reader, last, torch.tensor([getattr(example, name) for example in examples]))
        return losses


def _add(losses: dict[str, Tensor], name: str, reader: nn.Module, states: Tensor, wanted: Tensor) -> None:
    """Add the loss of a reader where there is something to read."""
    known = wanted != IGNORED
    if known.any():
        losses[name] = cross_entropy(reader(states[known]), wanted[known])


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def weights_of(module: nn.Module, dtype: torch.dtype) -> bytes:
    """Return a safetensors file that has tied weights once."""
    tensors = module.state_dict().items()
    kept = {name: tensor.to(dtype).contiguous() for name, tensor in tensors if name.removeprefix("t5.") not in TIED}
    return save(kept, metadata={"format": "pt"})


def save_model(t5: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the whole folder atomically: float16 weights, the configurations and the tokenizer.

    The tokenizer's configuration is written here, so that transformers 4 and 5 can both read it: each saves it under
    a class that the other may not have.
    """
    with write_directory(output) as folder:
        t5.config.save_pretrained(folder)
        t5.generation_config.save_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENIZER_FIELDS}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(weights_of(t5, torch.float16))


class State:
    """What a resumed run continues from, kept in ``folder``.

    Raises:
        SystemExit: the folder is of a run with other arguments.
    """

    def __init__(
        self, folder: Path, model: Pretraining, optimizer: torch.optim.Optimizer, arguments: dict[str, object]
    ):
        self.folder, self.model, self.optimizer, self.arguments = folder, model, optimizer, arguments
        self.minutes, self.step, self.losses, self.steps = 0.0, 0, {}, None
        if (recover_directory(folder) / "state.json").is_file():
            fields = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if fields["arguments"] != arguments:
                raise SystemExit(
                    f"{folder} is of a run with {fields['arguments']}, not {arguments}: give those, or remove it"
                )
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            self.minutes, self.step, self.losses = fields["minutes"], fields["step"], fields["losses"]
            self.steps = fields["steps"]

    def keep(self) -> None:
        with write_directory(self.folder) as folder:
            (folder / "model.safetensors").write_bytes(weights_of(self.model, torch.float32))
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            fields = {name: getattr(self, name) for name in ("arguments", "minutes", "step", "steps", "losses")}
            (folder / "state.json").write_text(json.dumps(fields), encoding="utf-8")
