"""AOTInductor's form of an export: compiled here, loaded, and the model's logits. It takes a minute of one core.

Run by `make test-packaging`.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from support.t5s import tiny_model, tiny_t5
from torch.testing import assert_close

from hyperformer_fast.export import export_model
from hyperformer_fast.export.artifact import decoded_logits
from hyperformer_fast.export.formats import FORMATS

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def test_a_compiled_graph_takes_shapes_that_it_was_not_traced_with(tmp_path):
    model = tiny_model(t5=tiny_t5(dtype=torch.float32, num_layers=1)).eval()
    description = export_model(model, tmp_path / "aoti", "aoti")
    files = {name: tmp_path / "aoti" / graph["file"] for name, graph in description["graphs"].items()}
    graphs = {name: FORMATS["aoti"].load(file) for name, file in files.items()}
    for samples, source, target in ((1, 4, 3), (3, 1, 1), (7, 21, 9)):
        batch = {
            "input_ids": torch.randint(64, (samples, source)),
            "attention_mask": torch.ones(samples, source, dtype=torch.long),
            "decoder_input_ids": torch.randint(64, (samples, target)),
            "task_index": torch.arange(samples) % 4 - 1,
        }
        with torch.no_grad():
            expected = model(**batch).logits
        assert_close(decoded_logits(graphs, batch), expected, rtol=1e-4, atol=1e-4)
