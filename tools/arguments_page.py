"""Write docs/arguments.md: every argument of a run with its default and its help text, which stand in the dataclasses.

python tools/arguments_page.py           # writes the page
python tools/arguments_page.py --check   # fails if the page is not what the dataclasses say
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from hyperformer_fast import HyperFormerConfig
from hyperformer_fast.training.arguments import DataArguments, HyperFormerTrainingArguments, ModelArguments

PAGE = Path(__file__).parents[1] / "docs" / "arguments.md"

INTRODUCTION = """# Arguments of a run

`hyperformer-fast train` takes every argument below as a flag (`--max_steps 100`, also `--max-steps 100`), or as a field
of a JSON or YAML file whose path is the last argument; a flag overrides the file. This page is written by
`tools/arguments_page.py` from the help texts of the dataclasses in `hyperformer_fast/training/arguments.py`, as is
`hyperformer-fast train --help`.
"""

SECTIONS = (
    ("The model", ModelArguments, "The T5, and what the run starts from."),
    ("The data", DataArguments, "[data.md](data.md) explains formats, tasks and splits."),
    ("The adapters", HyperFormerConfig, "The fields of `HyperFormerConfig`; its field `tasks` follows from the data."),
)

THEIRS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.Seq2SeqTrainingArguments"

TRAINING = f"""All arguments of transformers' [`Seq2SeqTrainingArguments`]({THEIRS}) work: optimizers, schedules,
precision, logging, checkpoints, evaluation, FSDP, DeepSpeed, `torch_compile`, `push_to_hub`. The following are
ours, or say more here.
"""

CHANGED = "These arguments of transformers have another default here."


def shown_type(annotation: Any) -> str:
    """Return a type as a reader needs it: ``str``, ``list of str``, ``int``."""
    inner = [each for each in typing.get_args(annotation) if each is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is list:
        return f"list of {shown_type(inner[0])}"
    if origin is dict:
        return "JSON object"
    if inner:
        return " or ".join(dict.fromkeys(map(shown_type, inner)))
    return getattr(annotation, "__name__", str(annotation))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field, or what its factory makes."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def cell(value: Any) -> str:
    """Return a value as the text of a table's cell."""
    if value is None:
        return ""
    value = getattr(value, "value", value)  # transformers' enumerations
    return f"`{value}`".replace("|", "\\|")


def table(fields: list[dataclasses.Field[Any]], hints: dict[str, Any]) -> str:
    """Return the Markdown table of some fields."""
    lines = ["| argument | type | default | |", "|---|---|---|---|"]
    for field in fields:
        text = str(field.metadata.get("help", "")).replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{field.name}` | {shown_type(hints[field.name])} | {cell(default_of(field))} | {text} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the content of docs/arguments.md."""
    parts = [INTRODUCTION]
    for title, kind, text in SECTIONS:
        fields = [field for field in dataclasses.fields(kind) if field.name != "tasks" or kind is not HyperFormerConfig]
        parts.append(f"## {title}\n\n{text}\n\n{table(fields, typing.get_type_hints(kind))}")
    theirs = {field.name: field.metadata.get("help") for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    # What the class itself declares: transformers' own fields and defaults differ between its versions.
    own = HyperFormerTrainingArguments.__annotations__
    declared = {field.name: field for field in dataclasses.fields(HyperFormerTrainingArguments)}
    ours = [declared[name] for name in own if name in declared]
    hints = typing.get_type_hints(HyperFormerTrainingArguments)
    new = [field for field in ours if theirs.get(field.name) != field.metadata.get("help")]
    parts.append(f"## The training\n\n{TRAINING}\n{table(new, hints)}")
    lines = ["| argument | default here |", "|---|---|"]
    changed = [field for field in ours if field not in new and default_of(field) is not None]
    lines += [f"| `{field.name}` | {cell(default_of(field))} |" for field in changed]
    parts.append(f"{CHANGED}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not write; fail if the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is out of date: run tools/arguments_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
