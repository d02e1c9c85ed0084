"""How ``hyperformer-fast train --help`` shows two hundred flags."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from transformers.hf_argparser import string_to_bool

#: The arguments of transformers that the short help shows; the others are in the long one.
_COMMON = frozenset(
    """
    output_dir resume_from_checkpoint max_steps num_train_epochs per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps learning_rate warmup_steps lr_scheduler_type weight_decay
    max_grad_norm label_smoothing_factor optim bf16 gradient_checkpointing torch_compile use_cpu eval_strategy
    eval_steps save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model logging_steps
    report_to push_to_hub hub_model_id fsdp deepspeed seed
    """.split()
)

#: Names beyond this number are not listed.
_LONGEST_CHOICE = 15


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each flag with a short placeholder, and defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        placeholder = _placeholder(action)
        name = ", ".join(action.option_strings) if action.option_strings[0] == "-h" else action.option_strings[0]
        return f"{name} {placeholder}" if placeholder else name

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        if action.choices is not None and len(list(action.choices)) <= _LONGEST_CHOICE:
            text += f" One of {', '.join(map(str, action.choices))}."
        if action.option_strings and not (action.default in (None, "", False) or action.default == []):
            if action.default is not argparse.SUPPRESS:
                text += f" (default: {action.default})".replace("%", "%%")
        return text


def _placeholder(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.nargs == "?":
        return "[BOOL]" if action.type is string_to_bool else "[TEXT]"
    kind: Any = action.type
    name = {int: "N", float: "X", str: "TEXT"}.get(kind, "VALUE")
    if isinstance(action.metavar, str):
        name = action.metavar
    return f"{name} [{name} ...]" if action.nargs == "+" else name


def shorten(parser: argparse.ArgumentParser, transformers_own: Collection[str]) -> None:
    """Hide the arguments of transformers that few need from the parser's help."""
    for action in parser._actions:
        if action.dest in transformers_own and action.dest not in _COMMON:
            action.help = argparse.SUPPRESS
