"""Print what a linear probe reads off the embedded T5 before it is adapted: the table of docs/tiny_t5.md.

python tools/probe_tiny.py

For each built-in task but `question`, whose target is free text: a logistic regression (ridge regression for a number)
on the mean, the maximum and the last state of the frozen encoder, trained on 1,500 rows, scored on the 250 of
validation. Beside it stands the share of the most frequent training label there.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hyperformer_fast.data.builtin import BUILTIN_SPECS, load_builtin
from hyperformer_fast.data.registry import builtin_spec
from hyperformer_fast.tiny import load_tiny

ROWS = 1500


@torch.no_grad()
def features(t5: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    states = t5.encoder(**batch).last_hidden_state
    shown = batch.attention_mask.unsqueeze(-1).bool()
    mean = (states * shown).sum(1) / shown.sum(1)
    last = states[range(len(texts)), batch.attention_mask.sum(1) - 1]
    return torch.cat([mean, states.masked_fill(~shown, -torch.inf).amax(1), last], 1).numpy()


def main() -> None:
    t5, tokenizer = load_tiny()
    print("| task | probe | most frequent label |\n|---|---|---|")
    for task, fields in BUILTIN_SPECS.items():
        if fields.get("target") == "text":
            continue
        spec, x, y = builtin_spec(task), {}, {}
        for split, count in (("train", ROWS), ("validation", None)):
            rows = load_builtin(task, split)[:count]
            x[split] = features(t5, tokenizer, [spec.source_text(row, "") for row in rows])
            y[split] = [row["label"] for row in rows]
        number = fields.get("target") == "number"
        probe = make_pipeline(StandardScaler(), Ridge(alpha=10) if number else LogisticRegression(max_iter=2000, C=0.1))
        probe.fit(x["train"], y["train"])
        if number:
            score, majority = pearsonr(probe.predict(x["validation"]), y["validation"])[0], 0.0
        else:
            frequent = collections.Counter(y["train"]).most_common(1)[0][0]
            score = probe.score(x["validation"], y["validation"])
            majority = y["validation"].count(frequent) / len(y["validation"])
        print(f"| `{task}` | {100 * score:.1f} | {100 * majority:.1f} |", flush=True)


if __name__ == "__main__":
    main()
