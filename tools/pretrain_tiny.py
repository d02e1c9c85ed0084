"""Pretrain the embedded byte-level T5 on text without labels.

    python tools/pretrain_tiny.py --text-dir DIR [DIR ...] --output hyperformer_fast/assets/tiny_t5 --minutes 30

It reads every .txt file and every string of every .jsonl file below the folders, and the unlabelled sentences of the
built-in tasks. Progress is kept in OUTPUT.partial, from which the same command continues. docs/tiny_t5.md says which
text the shipped weights were trained on.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast.checkpoint import recover_directory, write_directory
from hyperformer_fast.data.builtin import unlabelled_text

MAX_BYTES = 60
FIRST_SENTINEL = 259  # ByT5: 3 special ids, 256 bytes, then the sentinels
IGNORED = -100
CONFIG = T5Config(
    vocab_size=384,
    d_model=128,
    d_kv=32,
    d_ff=384,
    num_layers=4,
    num_decoder_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    feed_forward_proj="relu",
    decoder_start_token_id=0,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
)
TIED = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


def read_sentences(folders: Sequence[Path]) -> list[str]:
    """All distinct sentences with 15 to MAX_BYTES bytes and at least four words."""
    found: dict[str, None] = {}
    paths = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl")}
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if path.suffix == ".jsonl":
            rows = (json.loads(line) for line in text.splitlines() if line.strip())
            text = "\n\n".join(value for row in rows for value in row.values() if isinstance(value, str))
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if 15 <= len(sentence.encode()) <= MAX_BYTES and sentence.count(" ") >= 3:
                    found[sentence] = None
    return list(found)


class Example:
    """One source and target, and what is known of each word of the source.

    ``ends`` are the positions of the words' last bytes; ``words`` their indices in the list of frequent words;
    ``shared`` whether the other sentence of a pair has them; ``altered`` whether they are not as they stood in the
    text. IGNORED where there is nothing to know.
    """

    def __init__(self, vocabulary: dict[str, int]):
        self.vocabulary = vocabulary
        self.source: list[int] = []
        self.target: list[int] = []
        self.ends: list[int] = []
        self.words: list[int] = []
        self.shared: list[int] = []
        self.altered: list[int] = []

    def say(self, text: str) -> None:
        self.source += encode(text)

    def lay(
        self,
        words: Sequence[str],
        other: Sequence[str] | None = None,
        hidden: dict[int, int] | None = None,
        altered: set[int] | None = None,
    ) -> None:
        """Append a sentence; ``hidden`` gives the words that are not shown the ids shown in their place."""
        for i, word in enumerate(words):
            self.say(" " * (i > 0))
            self.source += [hidden[i]] if hidden and i in hidden else encode(word)
            self.ends.append(len(self.source) - 1)
            self.words.append(self.vocabulary.get(word, IGNORED))
            self.shared.append(IGNORED if other is None else int(word in other))
            self.altered.append(IGNORED if altered is None else int(i in altered))


class Objectives:
    """Draws batches of single sentences or of pairs; mixing them would pad, since a pair is about twice as long."""

    def __init__(self, general: list[str], builtin: list[str], seed: int):
        self.general, self.builtin, self.draw = general, builtin, random.Random(seed)
        counts = collections.Counter(word for sentence in general for word in sentence.split())
        frequent = [word for word, _ in counts.most_common(1000)]
        self.all_words = [word for sentence in builtin for word in sentence.split()]
        self.vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*sorted(set(self.all_words)), *frequent]))}

    def sentence(self) -> list[str]:
        pool = self.builtin if not self.general or self.draw.random() < 0.8 else self.general
        return self.draw.choice(pool).split()

    def batch(self, size: int) -> list[Example]:
        if self.draw.random() < 0.5:
            makers, weights = (self.spans, self.intact, self.endings, self.last), (4, 3, 2, 1)
        else:
            makers, weights = (self.pair_spans, self.count), (2, 5)
        return [maker() for maker in self.draw.choices(makers, weights, k=size)]

    def spans(self) -> Example:
        """T5's span corruption with words for spans: a sentinel in place of each, and their bytes as the target."""
        example, words = Example(self.vocabulary), self.sentence()
        hidden = self._hide(example, words)
        example.say("sentence: ")
        example.lay(words, hidden=hidden)
        return example

    def pair_spans(self) -> Example:
        """Span corruption of the second of two sentences that share words; some can be copied from the first."""
        example = Example(self.vocabulary)
        first, second = self._relatives()
        hidden = self._hide(example, second)
        self._pair(example, first, second, hidden)
        return example

    def count(self) -> Example:
        """How many words of the second sentence does the first not have?"""
        example = Example(self.vocabulary)
        first, second = self._relatives()
        self._pair(example, first, second, prefix="count: " * (self.draw.random() < 0.3))
        example.target = encode(str(min(9, sum(word not in first for word in second))))
        return example

    def intact(self) -> Example:
        """Did a word gain or lose an s, did two neighbours change places, or did a word come from elsewhere?"""
        example, words, altered = Example(self.vocabulary), self.sentence(), set()
        if self.draw.random() < 0.5:
            i, way = self.draw.randrange(len(words) - 1), self.draw.random()
            altered = {i, i + 1} if way < 0.25 else {i}
            if way < 0.25:
                words[i], words[i + 1] = words[i + 1], words[i]
            elif way < 0.5:
                words[i] = self.draw.choice(self.all_words)
            else:
                words[i] = words[i][:-1] if words[i].endswith("s") else words[i] + "s"
        example.say("intact: " * (self.draw.random() < 0.5) + "sentence: ")
        example.lay(words, altered=altered)
        example.target = encode(str(int(not altered)))
        return example

    def endings(self) -> Example:
        """How many words end in the letter?"""
        example, words = Example(self.vocabulary), self.sentence()
        letter = self.draw.choice("sssetdny")
        example.say(f"ending in {letter}: sentence: ")
        example.lay(words)
        example.target = encode(str(min(9, sum(word.endswith(letter) for word in words))))
        return example

    def last(self) -> Example:
        """Repeat the last word."""
        example, words = Example(self.vocabulary), self.sentence()
        example.say("last: sentence: ")
        example.lay(words)
        example.target = encode(words[-1])
        return example

    def _hide(self, example: Example, words: list[str]) -> dict[int, int]:
        chosen = sorted(self.draw.sample(range(len(words)), max(1, round(0.2 * len(words)))))
        hidden = {i: FIRST_SENTINEL + n for n, i in enumerate(chosen)}
        for i, sentinel in hidden.items():
            example.target += [sentinel, *encode(words[i])]
        return hidden

    def _relatives(self) -> tuple[list[str], list[str]]:
        """A sentence, and a copy of it with up to five words replaced, some left out, its halves perhaps swapped."""
        first = self.sentence()[:9]
        second = list(first)
        for i in self.draw.sample(range(len(second)), self.draw.randint(0, min(5, len(second)))):
            second[i] = self.draw.choice(self.all_words)
        if self.draw.random() < 0.4:
            second = [word for word in second if self.draw.random() < 0.8] or second
        if self.draw.random() < 0.2:
            turn = self.draw.randrange(len(second))
            second = second[turn:] + second[:turn]
        return first, second

    def _pair(self, example: Example, first: list[str], second: list[str], hidden=None, prefix: str = "") -> None:
        example.say(prefix + "sentence1: ")
        example.lay(first, other=second)
        example.say(" sentence2: ")
        example.lay(second, other=first, hidden=hidden)


def encode(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


class Pretraining(nn.Module):
    """The T5, and linear readers of its encoder that are dropped after training.

    At each word's last byte they read which word it is (from the middle and the top of the encoder), whether the other
    sentence of the pair has it, and whether it was altered. At the end token they read the words of a sentence, and the
    first byte of the target. The decoder's few bytes of target say little about each byte of the source: with readers
    the encoder knew most words after 900 steps, when the decoder could not yet write one.
    """

    def __init__(self, words: int):
        super().__init__()
        self.t5 = T5ForConditionalGeneration(CONFIG)
        reader = lambda n: nn.Sequential(nn.LayerNorm(CONFIG.d_model), nn.Linear(CONFIG.d_model, n))  # noqa: E731
        self.middle, self.top, self.shared, self.altered = reader(words), reader(words), reader(2), reader(2)
        self.bag, self.answer = reader(words), reader(CONFIG.vocab_size)
        self._look_for_likes()

    @torch.no_grad()
    def _look_for_likes(self) -> None:
        """Initialise the last head of the upper encoder layers to attend to similar positions far away.

        Keys equal to queries, up to a factor, make every position attend to what resembles it; the bias makes what is
        near less likely. From a random start 1,150 steps taught it next to nothing of which words two sentences share
        (a loss of 0.61, where chance is 0.65); given to that same model, this halved the loss in 125.
        """
        width = CONFIG.d_kv
        for block in self.t5.encoder.block[CONFIG.num_layers // 2 :]:
            attention = block.layer[0].SelfAttention
            attention.q.weight[-width:] = attention.k.weight[-width:] / 2
        bias = self.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        half = CONFIG.relative_attention_num_buckets // 2
        # the first ten of each direction's 16 buckets are for distances below 16
        bias.view(2, half, -1)[:, :10, -1] = -5.0

    def forward(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        source = pad([[*example.source, 1] for example in examples], 0)
        labels = pad([[*example.target, 1] for example in examples], IGNORED)
        out = self.t5(input_ids=source, attention_mask=(source != 0).long(), labels=labels, output_hidden_states=True)
        rows = torch.tensor([row for row, example in enumerate(examples) for _ in example.ends])
        ends = torch.tensor([end for example in examples for end in example.ends])
        words = torch.tensor([word for example in examples for word in example.words])
        middle = out.encoder_hidden_states[CONFIG.num_layers // 2][rows, ends]
        top = out.encoder_last_hidden_state[rows, ends]
        losses = {"text": out.loss}
        losses["middle"] = cross_entropy(self.middle(middle), words, ignore_index=IGNORED)
        losses["top"] = cross_entropy(self.top(top), words, ignore_index=IGNORED)
        end = out.encoder_last_hidden_state[range(len(examples)), [len(example.source) for example in examples]]
        losses["answer"] = cross_entropy(self.answer(end), labels[:, 0])
        if examples[0].shared[0] == IGNORED:
            losses["bag"] = cross_entropy(self.bag(end)[rows], words, ignore_index=IGNORED)
        for name, reader in (("shared", self.shared), ("altered", self.altered)):
            flags = torch.tensor([flag for example in examples for flag in getattr(example, name)])
            if (flags != IGNORED).any():
                losses[name] = cross_entropy(reader(top), flags, ignore_index=IGNORED)
        return losses


def weights_of(module: nn.Module, dtype: torch.dtype) -> bytes:
    """A safetensors file that has tied weights once."""
    tensors = module.state_dict().items()
    kept = {name: tensor.to(dtype).contiguous() for name, tensor in tensors if name.removeprefix("t5.") not in TIED}
    return save(kept, metadata={"format": "pt"})


def save_model(t5: T5ForConditionalGeneration, output: Path) -> None:
    """Write the whole folder atomically: float16 weights, config.json and generation_config.json."""
    with write_directory(output) as folder:
        t5.config.save_pretrained(folder)
        t5.generation_config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(weights_of(t5, torch.float16))


class State:
    """What a resumed run continues from, kept in ``folder``."""

    def __init__(self, folder: Path, model: Pretraining, optimizer: torch.optim.Optimizer):
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.minutes, self.step, self.losses = 0.0, 0, {}
        if (recover_directory(folder) / "state.json").is_file():
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            fields = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self.minutes, self.step, self.losses = fields["minutes"], fields["step"], fields["losses"]

    def keep(self) -> None:
        with write_directory(self.folder) as folder:
            (folder / "model.safetensors").write_bytes(weights_of(self.model, torch.float32))
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            fields = {"minutes": self.minutes, "step": self.step, "losses": self.losses}
            (folder / "state.json").write_text(json.dumps(fields), encoding="utf-8")


def train(state: State, objectives: Objectives, minutes: float, batch_size: int, learning_rate: float) -> None:
    """Train until ``minutes`` are spent, with a linear warm-up and a cosine decay over that time."""
    columns = (TextColumn("step {task.fields[step]}  {task.fields[loss]}"), BarColumn(), TimeRemainingColumn())
    averages: dict[str, float] = {}
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=minutes, completed=state.minutes, step=state.step, loss="")
        kept = state.minutes
        while state.minutes < minutes:
            started = time.perf_counter()
            rate = min(1.0, (state.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * state.minutes / minutes))
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate * rate
            losses = state.model(objectives.batch(batch_size))
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            for name, loss in losses.items():
                averages[name] = 0.98 * averages.get(name, loss.item()) + 0.02 * loss.item()
            state.step, state.minutes = state.step + 1, state.minutes + (time.perf_counter() - started) / 60
            if state.step % 50 == 0:
                state.losses[str(state.step)] = {name: round(value, 4) for name, value in averages.items()}
                shown = "  ".join(f"{name} {value:.2f}" for name, value in averages.items())
                progress.update(bar, completed=state.minutes, step=state.step, loss=shown)
                if not progress.console.is_terminal:
                    print(f"{state.minutes:.1f} min, step {state.step}: {shown}", flush=True)
            if state.minutes - kept > 3:
                kept = state.minutes
                state.keep()
    state.keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-dir", type=Path, nargs="*", default=[], help="folders of .txt and .jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="of training, all resumed runs together")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    objectives = Objectives(read_sentences(arguments.text_dir), list(unlabelled_text()), arguments.seed)
    torch.manual_seed(arguments.seed)
    model = Pretraining(len(objectives.vocabulary)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    state = State(arguments.output.with_name(arguments.output.name + ".partial"), model, optimizer)
    objectives.draw.seed(f"{arguments.seed} {state.step}")
    print(
        f"{len(objectives.general):,} sentences of text, {len(objectives.builtin):,} of the built-in tasks, "
        f"{model.t5.num_parameters():,} parameters"
    )
    train(state, objectives, arguments.minutes, arguments.batch_size, arguments.learning_rate)
    save_model(model.t5.eval(), arguments.output)
    print(f"{arguments.output}: {state.step} steps")


if __name__ == "__main__":
    main()
