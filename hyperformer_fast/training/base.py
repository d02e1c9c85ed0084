"""Load the T5 that a run adapts, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .folder import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration


def load_base(model: str | None) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load (T5 in float32, tokenizer) from a folder or from the Hub.

    Args:
        model: a folder, or a name on the Hub; None for the embedded tiny T5.

    Raises:
        RunError: the model does not exist, is not a T5, or lacks weights.
    """
    if model is None:
        from ..tiny import load_tiny

        return load_tiny()
    from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

    looks_local = os.sep in model and (model.count(os.sep) > 1 or model[0] in "./~")
    if looks_local and not Path(model).is_dir():
        raise RunError(f"the model {model!r} is not a folder")
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        if kind != "t5":
            raise RunError(f"the model {model!r} is a {kind}, not a T5")
        # transformers declares only the result without loading information.
        loaded: Any = T5ForConditionalGeneration.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        t5, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(model)
    except RunError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError or an error of the network
        raise RunError(f"cannot load the model {model!r}: {str(error).strip() or type(error).__name__}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise RunError(f"the model {model!r} lacks weights: {missing[0]} (and {len(missing) - 1} more)")
    return t5, tokenizer
