"""The model card: a README.md that says what a saved model is, and how to load it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import write_file
from .tiny import EMBEDDED

if TYPE_CHECKING:
    from .config import HyperFormerConfig
    from .parameters import ParameterCount

NAME = "README.md"

#: The last line of a card. The digest is of the text before it, so that a card that was edited is recognised.
_SIGNATURE = "<!-- Written by hyperformer_fast, which leaves an edited card alone. {} -->\n"
_SIGNED = re.compile(re.escape(_SIGNATURE).replace(re.escape("{}"), "([0-9a-f]{16})"))

_PAPER = "[HyperFormer](https://arxiv.org/abs/2106.04489)"
_METHOD = f"Hypernetworks generate adapters for each task from its embedding ({_PAPER})"

#: The method, for variants that are baselines.
_BASELINES = {
    "adapters": f"Each task has adapters of its own (a baseline of {_PAPER})",
    "finetuning": f"The whole T5 was trained (a baseline of {_PAPER})",
}

_TEMPLATE = """\
# {title}

{base}, trained on {count} with `hyperformer_fast`.
{method}.
These files hold what was trained; what is frozen of the T5 is loaded from where it came from.

## Tasks

{tasks}

## How to load

```python
{loading}
inputs = tokenizer(["..."], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, task={task!r}), skip_special_tokens=True))
```

## What is trained

| part | parameters |
|---|---:|
| hypernetworks and adapters | {hypernetworks:,} |
| task embeddings | {task_embeddings:,} |
| of the T5 itself | {t5_trained:,} |
| all, per task, in percent of the T5's {t5_total:,} | {percent:.3f} % |

Variant `{variant}`, reduction factor {reduction_factor}, activation `{activation}`.

"""


def write(
    folder: str | os.PathLike[str],
    config: HyperFormerConfig,
    count: ParameterCount,
    base: str,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write the card of a model into its folder, unless there is one that somebody else wrote or edited.

    Args:
        folder: the model's folder.
        config: its configuration.
        count: its parameters.
        base: the name of its T5: on the Hub, of a folder, "embedded", or "".
        metrics: task -> metric -> value, as far as known.
        tags: further tags.
    """
    path = Path(folder, NAME)
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        return
    with write_file(path) as partial:
        partial.write_text(_signed(_text(config, count, base, metrics or {}, tags)), encoding="utf-8")


def is_ours(text: str) -> bool:
    """Whether a card was written by this module, and not edited since."""
    signature = _SIGNED.search(text)
    return signature is not None and text == _signed(text[: signature.start()])


def _signed(text: str) -> str:
    return text + _SIGNATURE.format(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16])


def _text(
    config: HyperFormerConfig,
    count: ParameterCount,
    base: str,
    metrics: Mapping[str, Mapping[str, float]],
    tags: Sequence[str],
) -> str:
    from huggingface_hub import ModelCardData

    on_hub = bool(base) and base != EMBEDDED and not os.path.isabs(base)
    data = ModelCardData(
        library_name="hyperformer_fast",
        base_model=base if on_hub else None,
        pipeline_tag="text2text-generation",
        tags=list(dict.fromkeys(["hyperformer", *tags])),
    )
    text = _TEMPLATE.format(
        title=f"{config.variant} for {_tasks_in_words(config)}",
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else "A T5",
        count=_tasks_in_words(config),
        method=_BASELINES.get(str(config.variant), _METHOD),
        tasks=_table(config.tasks, metrics),
        loading=_loading(base, on_hub),
        task=config.tasks[0],
        percent=count.percent_per_task,
        variant=config.variant,
        reduction_factor=config.reduction_factor,
        activation=config.non_linearity,
        **{name: getattr(count, name) for name in ("hypernetworks", "task_embeddings", "t5_trained", "t5_total")},
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _tasks_in_words(config: HyperFormerConfig) -> str:
    return f"{len(config.tasks)} tasks" if len(config.tasks) > 1 else "one task"


def _table(tasks: Sequence[str], metrics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["task", *names], ["---", *["---:"] * len(names)]]
    for task in tasks:
        values = metrics.get(task, {})
        rows.append([f"`{_cell(task)}`", *(f"{values[name]:.2f}" if name in values else "" for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    """A task's name in a cell of a table: any text is a legal name."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("|", "\\|").replace("`", "'").split())


def _loading(base: str, on_hub: bool) -> str:
    if on_hub or base == EMBEDDED:
        tokenizer = f"AutoTokenizer.from_pretrained({base!r})" if on_hub else "load_tiny_tokenizer()"
        lines = ['model = HyperFormerModel.from_pretrained("...")  # this folder, or its id on the Hub']
    else:
        tokenizer = "AutoTokenizer.from_pretrained(...)  # of the T5"
        lines = ['model = HyperFormerModel.from_pretrained("...", t5=t5)  # t5: what this model was trained on']
    kind = tokenizer.partition(".")[0].partition("(")[0]
    imports = ["from hyperformer_fast import HyperFormerModel"]
    if kind == "AutoTokenizer":
        imports.insert(0, "from transformers import AutoTokenizer")
    else:
        imports.append("from hyperformer_fast.tiny import load_tiny_tokenizer")
    return "\n".join([*imports, "", *lines, f"tokenizer = {tokenizer}"])
