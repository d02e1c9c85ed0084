"""The T5 that a run adapts, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .folder import RunError


def load_base(model: str | None):
    """(T5 in float32, tokenizer) of a folder or a name on the Hub; the embedded tiny ones for None.

    Raises:
        RunError: it is not there, is no T5, or lacks weights.
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
        t5, info = T5ForConditionalGeneration.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except RunError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, errors of the network: all mean the same here
        raise RunError(f"cannot load the model {model!r}: {str(error).strip() or type(error).__name__}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise RunError(f"the model {model!r} lacks weights: {missing[0]} (and {len(missing) - 1} more)")
    return t5, tokenizer
