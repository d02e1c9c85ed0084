"""Load the T5 that a run adapts, and its tokenizer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..fusion.pieces import Fuse
from ..tiny import load_tiny, load_tiny_tokenizer
from .arguments import EMBEDDED, ModelArguments
from .folder import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration


def fuse_of(arguments: ModelArguments) -> Fuse:
    """What of the T5 is fused in a run, as ``get_hyperformer_model`` takes it."""
    names = arguments.fuse
    if names is None:
        return "auto"
    return names[0] if len(names) == 1 else frozenset(names)


def load_base(
    arguments: ModelArguments, name: str | None = None
) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load (T5 in float32, tokenizer) from a folder or from the Hub, or the embedded tiny T5.

    Args:
        arguments: which T5, and how the Hub is asked for it.
        name: a folder, or a name on the Hub, that takes precedence.

    Raises:
        RunError: the model does not exist, is not a T5, or lacks weights.
    """
    model = name or arguments.model_name_or_path
    if model is None or model == EMBEDDED:
        return load_tiny()[0], load_tokenizer(arguments, EMBEDDED)
    from transformers import AutoConfig, T5ForConditionalGeneration

    hub = _hub(arguments)
    looks_local = os.sep in model and (model.count(os.sep) > 1 or model[0] in "./~")
    if looks_local and not Path(model).is_dir():
        raise RunError(f"the model {model!r} is not a folder")
    try:
        kind = AutoConfig.from_pretrained(model, **hub).model_type
        if kind != "t5":
            raise RunError(f"the model {model!r} is a {kind}, not a T5")
        # transformers declares only the result without loading information.
        loaded: Any = T5ForConditionalGeneration.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, **hub
        )
        t5, info = loaded
        tokenizer = load_tokenizer(arguments, model)
    except RunError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError or an error of the network
        raise RunError(f"cannot load the model {model!r}: {str(error).strip() or type(error).__name__}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise RunError(f"the model {model!r} lacks weights: {missing[0]} (and {len(missing) - 1} more)")
    return t5, tokenizer


def load_tokenizer(arguments: ModelArguments, model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a T5 that is loaded by this name."""
    if model == EMBEDDED:
        if arguments.tokenizer_name is not None:
            warnings.warn(
                f"tokenizer_name={arguments.tokenizer_name!r} is not the embedded T5's: ignored", stacklevel=3
            )
        return load_tiny_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arguments.tokenizer_name or model, **_hub(arguments))


def _hub(arguments: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": arguments.cache_dir, "revision": arguments.model_revision, "token": arguments.token}
