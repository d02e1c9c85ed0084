"""Generate for a batch of mixed tasks, and compare each row's tokens with those of a call for its task alone.

    python benchmarks/mixed_texts.py [--t5 FOLDER] [--data FOLDER] [--rows 200] [--new-tokens 12] [--ways WAY ...]

A pretrained T5 (default: the embedded one) under HyperFormer++ with random adapters, and rows of the built-in tasks, or
of --data (a folder of tasks, as `hyperformer-fast train` takes it). The rows of each task make one call, and all rows
together another. Sampling draws numbers for a batch as a whole: there, a row is compared with a call for all rows with
its task, after the same seed. Said as well is how many rows have other tokens with the weights of another task, without
which the comparison would say nothing. Returns 1 if a row has other tokens than alone, and shows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from real_rows import Case, adapted, real_case
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.tiny import EMBEDDED

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "static cache": {"cache_implementation": "static"},
    "encoder_outputs given": {},
    "sampling": {"do_sample": True},
}
ENCODED, SAMPLED = "encoder_outputs given", "sampling"


class Comparison:
    """A model and its rows; the calls of each way."""

    def __init__(self, case: Case, tokens: int):
        self.model: HyperFormerModel = adapted(case.t5, case)
        self.case, self.tokens = case, tokens
        self.given = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
        self.eos = self.model.config.eos_token_id
        start = torch.zeros(len(case.tasks), 1, dtype=torch.long)
        with torch.inference_mode():
            out = self.model(**self.given, decoder_input_ids=start, task=case.tasks)
        self.states: Tensor = out.encoder_last_hidden_state

    def generated(self, way: str, rows: Sequence[int], task: str | list[str]) -> list[list[int]]:
        """The tokens of some rows, up to the end of each text."""
        inputs: dict[str, Any] = {name: value[list(rows)] for name, value in self.given.items()}
        if way == ENCODED:
            inputs = {"attention_mask": inputs["attention_mask"]}
            inputs["encoder_outputs"] = BaseModelOutput(self.states[list(rows)])
        torch.manual_seed(0)
        found = self.model.generate(**inputs, task=task, max_new_tokens=self.tokens, **WAYS[way]).tolist()
        return [row[1 : row.index(self.eos, 1) + 1] if self.eos in row[1:] else row[1:] for row in found]

    def depending(self) -> int:
        """How many rows have other tokens, greedily, with the weights of the next task."""
        tasks, every = self.case.tasks, range(len(self.case.tasks))
        names = list(dict.fromkeys(tasks))
        following = dict(zip(names, names[1:] + names[:1]))
        own, other = (self.generated("greedy", every, of) for of in (tasks, [following[task] for task in tasks]))
        return sum(one != another for one, another in zip(own, other))

    def compare(self, way: str) -> list[tuple[int, list[int], list[int]]]:
        """The rows that differ, with their tokens in the mixed batch and in the call for their task."""
        tasks, every = self.case.tasks, range(len(self.case.tasks))
        together = self.generated(way, every, tasks)
        differing = []
        for task in dict.fromkeys(tasks):
            rows = [row for row in every if tasks[row] == task]
            asked = every if way == SAMPLED else rows
            alone = dict(zip(asked, self.generated(way, asked, task)))
            differing += [(row, together[row], alone[row]) for row in rows if together[row] != alone[row]]
        return differing


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if a row has other tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t5", metavar="FOLDER", default=EMBEDDED, help="a pretrained T5 (default: the embedded one)")
    parser.add_argument("--data", metavar="FOLDER", help="tasks to take rows of (default: the built-in ones)")
    parser.add_argument("--rows", type=int, default=200, help="default: 200")
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens to write at most (default: 12)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    options = parser.parse_args(arguments)
    comparison = Comparison(real_case(options.t5, options.data, options.rows), options.new_tokens)
    print(f"{comparison.depending()} of {options.rows} rows have other tokens with another task's weights", flush=True)
    wrong = 0
    for way in options.ways:
        differing = comparison.compare(way)
        wrong += len(differing)
        tasks = len(dict.fromkeys(comparison.case.tasks))
        print(
            f"{way}: {options.rows - len(differing)} of {options.rows} rows of {tasks} tasks are the same", flush=True
        )
        for row, together, alone in differing:
            print(f"  row {row}, {comparison.case.tasks[row]}: {together} in company, {alone} alone")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
