"""The embedded T5's tokenizer: a small byte-level BPE, in which most words of the built-in tasks are one piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTINELS = 100

#: What transformers keeps of a tokenizer beside the pieces.
TOKENIZER_FIELDS = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(SENTINELS)],
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "model_max_length": 512,
    "model_input_names": ["input_ids", "attention_mask"],
}

#: Words that stand around the sentences, and digits: each is to be one piece, and texts say them rarely or never. (What
#: objectives answer need not be: "kept" is written in several.)
_FRAME = "sentence sentence1 sentence2 context question count follows intact after before last: 0 1 2 3 4 5 6 7 8 9"
#: How often the tokenizer's training reads them.
FRAMES = 20_000


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of ``size`` pieces, T5's special ones and its 100 sentinels among them.

    Its alphabet is all bytes, so no text is lost; a digit is a piece of its own. Training is deterministic.
    """
    tokenizer = Tokenizer(models.BPE())
    digit = pre_tokenizers.Split(Regex("Ġ?[0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True), digit])
    # The prefixed space goes again.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    # A sentinel takes the space before it along, so that what follows it is written as any word.
    names = TOKENIZER_FIELDS["additional_special_tokens"]
    sentinels = [AddedToken(name, lstrip=True, normalized=False, special=True) for name in names]
    trainer = trainers.BpeTrainer(
        vocab_size=size - SENTINELS,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(texts, itertools.repeat(_FRAME, FRAMES)), trainer)
    tokenizer.add_special_tokens(sentinels)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENIZER_FIELDS)


class WordIds:
    """The ids of texts word by word, remembered, since pretraining lays the same words again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
        self.word = lru_cache(100_000)(self._word)

    def _word(self, word: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(word, add_special_tokens=False).input_ids)

    def text(self, text: str) -> list[int]:
        return [i for word in text.split() for i in self.word(word)]
