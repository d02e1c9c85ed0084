"""The default model: a byte-level T5 that is small enough to be part of the package, and ByT5's tokenizer, which needs
no files.

docs/tiny_t5.md says what the T5 was trained on.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import ByT5Tokenizer, T5ForConditionalGeneration


def load_tiny() -> tuple[T5ForConditionalGeneration, ByT5Tokenizer]:
    """Load the T5 and the tokenizer from the package; nothing is downloaded.

    Returns:
        The T5 in float32 (its file is float16) and in eval mode, and the tokenizer.

    Raises:
        FileNotFoundError: the package was installed without its assets.
    """
    import torch
    from transformers import ByT5Tokenizer, T5ForConditionalGeneration

    asset = files("hyperformer_fast") / "assets" / "tiny_t5"
    for name in ("config.json", "model.safetensors"):
        if not (asset / name).is_file():
            raise FileNotFoundError(
                f"the embedded T5 lacks {asset / name}: reinstall hyperformer_fast, or make it with "
                "tools/pretrain_tiny.py"
            )
    with as_file(asset) as folder:
        t5 = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return t5.eval(), ByT5Tokenizer()
