"""An installation with the core's packages only: the model works, the rest asks for what it needs by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "accelerate datasets matplotlib rich rouge_score sacrebleu scipy sentencepiece sklearn".split()

# None in sys.modules is how Python itself marks a module that must not be found.
HIDE = f"import sys; sys.modules.update(dict.fromkeys({TRAIN!r}))\n"


def _run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-c", HIDE + code], env=environment, capture_output=True, text=True)


def test_the_model_needs_none_of_them(tmp_path):
    done = _run(
        "import torch\n"
        "from transformers import T5Config, T5ForConditionalGeneration as T5\n"
        "from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model\n"
        "sizes = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=8)\n"
        "t5 = T5(T5Config(**sizes, decoder_start_token_id=0))\n"
        "model = get_hyperformer_model(t5, HyperFormerConfig(tasks=['a'], reduction_factor=4))\n"
        "ids = torch.tensor([[3, 1]])\n"
        "model(input_ids=ids, labels=ids).loss.backward()\n"
        f"model.save_pretrained({str(tmp_path)!r})\n"
        f"HyperFormerModel.from_pretrained({str(tmp_path)!r}, t5=model.unload())\n"
        "from hyperformer_fast.cli import main\n"
        "raise SystemExit(main(['doctor']))\n"
    )
    assert done.returncode == 0, done.stderr
    assert "All live checks passed." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["train"], "training needs accelerate, datasets, rich, scipy and scikit-learn"),
        (["evaluate", "run"], "training needs accelerate"),
        (["params"], "the table of parameters needs rich, which is not installed"),
    ],
)
def test_commands_ask_for_them_by_name(arguments, what):
    done = _run(f"from hyperformer_fast.cli import main\nraise SystemExit(main({arguments!r}))\n")
    assert done.returncode == 1
    assert what in done.stderr and "pip install 'hyperformer-fast[train]'" in done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
