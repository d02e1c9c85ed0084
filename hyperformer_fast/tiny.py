"""The default model: a T5 that is small enough to be part of the package, and its tokenizer.

docs/tiny_t5.md says what they were trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

#: The embedded T5's name, in checkpoints and for the command; its folder is another on every machine.
EMBEDDED = "embedded"


def load_tiny(kind: Any = None, **options: Any) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """Load the T5 and the tokenizer from the package; nothing is downloaded.

    Args:
        kind: another class of T5 to load its weights into.
        options: keyword arguments of ``from_pretrained``.

    Returns:
        The T5 in float32 (its file is float16) and in eval mode, and the tokenizer.

    Raises:
        FileNotFoundError: the package was installed without its assets.
    """
    import torch
    from transformers import T5ForConditionalGeneration

    with as_file(_complete_asset()) as folder:
        options = {"dtype": torch.float32, **options, "local_files_only": True}
        t5 = (kind or T5ForConditionalGeneration).from_pretrained(folder, **options)
    return t5.eval(), load_tiny_tokenizer()


def load_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Load the tokenizer of the embedded T5 from the package.

    Raises:
        FileNotFoundError: the package was installed without its assets.
    """
    from transformers import PreTrainedTokenizerFast

    with as_file(_complete_asset()) as folder:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def fits_embedded(config: Mapping[str, Any]) -> bool:
    """Return whether a T5's configuration has the sizes of the embedded T5, which are others in other versions."""
    ours = json.loads((_asset() / "config.json").read_text(encoding="utf-8"))
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    return all(config.get(size) == ours[size] for size in sizes)


def name_of(t5: nn.Module) -> str:
    """Return the name by which a T5 is loaded again: on the Hub, of its folder, or "embedded"; "" where it has none."""
    config: Any = t5.config
    name = str(config.name_or_path or "")
    if os.path.isdir(name):
        name = os.path.abspath(name)
        if os.path.realpath(name) == os.path.realpath(str(_asset())):
            return EMBEDDED
    return name


def _asset() -> Any:
    return files("hyperformer_fast") / "assets" / "tiny_t5"


def _complete_asset() -> Any:
    asset = _asset()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (asset / name).is_file():
            raise FileNotFoundError(
                f"the embedded T5 lacks {asset / name}: reinstall hyperformer_fast, or make it with "
                "tools/pretrain_tiny.py"
            )
    return asset
