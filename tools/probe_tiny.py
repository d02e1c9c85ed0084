"""Print what the embedded T5 knows of the built-in tasks before it is adapted: the table of docs/tiny_t5.md.

    python tools/probe_tiny.py [--t5 FOLDER]

FOLDER is another T5 that tools/pretrain_tiny.py made.

On the 250 validation rows of each task, in percent (correlation for a number):

- probe: a logistic regression (ridge regression for a number) on the mean, the maximum and the last state of the frozen
  encoder, trained on 1,500 rows;
- as written: what the frozen T5 writes is the label's text;
- as read: what it writes is taken for the label that it goes with most often in these 1,500 rows (the mean for a
  number), because it may answer in words of its own;
- the most frequent training label.
"""

from __future__ import annotations

import argparse
import collections
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer, T5ForConditionalGeneration

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


@torch.no_grad()
def answers(t5: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    """What the frozen T5 writes, greedily."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return tokenizer.batch_decode(t5.generate(**batch, max_new_tokens=12), skip_special_tokens=True)


def read(written: list[str], labels: list[Any], number: bool) -> dict[str, Any]:
    """The label that each answer goes with most often; the mean of its labels for a number."""
    of: dict[str, list[Any]] = {}
    for answer, label in zip(written, labels, strict=True):
        of.setdefault(answer, []).append(label)
    return {
        answer: float(np.mean(found)) if number else collections.Counter(found).most_common(1)[0][0]
        for answer, found in of.items()
    }


def correlation(found: list[float], labels: list[float]) -> float:
    return float(pearsonr(found, labels)[0]) if len(set(found)) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--t5", metavar="FOLDER", help="default: the embedded T5")
    folder = parser.parse_args().t5
    if folder is None:
        t5, tokenizer = load_tiny()
    else:
        t5 = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    print("| task | probe | as written | as read | most frequent label |\n|---|---|---|---|---|")
    for task, fields in BUILTIN_SPECS.items():
        spec, x, y, written = builtin_spec(task), {}, {}, {}
        kind = fields.get("target")
        for split, count in (("train", ROWS), ("validation", None)):
            rows = load_builtin(task, split)[:count]
            texts = [spec.source_text(row, "") for row in rows]
            x[split], written[split] = features(t5, tokenizer, texts), answers(t5, tokenizer, texts)
            y[split] = [row["label"] for row in rows]
            exact = [answer == spec.target_text(row["label"]) for answer, row in zip(written[split], rows, strict=True)]
        table = read(written["train"], y["train"], kind == "number")
        frequent = collections.Counter(y["train"]).most_common(1)[0][0]
        of_answers = [table.get(answer, frequent) for answer in written["validation"]]
        if kind == "number":
            probe = make_pipeline(StandardScaler(), Ridge(alpha=10)).fit(x["train"], y["train"])
            scores = [correlation(probe.predict(x["validation"]), y["validation"]), np.nan]
            scores += [correlation(of_answers, y["validation"]), 0.0]
        else:
            right = [[a == b for a, b in zip(found, y["validation"], strict=True)]
                     for found in (of_answers, [frequent] * len(of_answers))]  # fmt: skip
            scores = [np.nan, float(np.mean(exact)), *(float(np.mean(each)) for each in right)]
            if kind != "text":
                probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
                scores[0] = probe.fit(x["train"], y["train"]).score(x["validation"], y["validation"])
            else:
                scores[2] = np.nan  # an answer of one row says nothing of another's
        cells = ["" if np.isnan(score) else f"{100 * score:.1f}" for score in scores]
        print(f"| `{task}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
