from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from transformers import T5Config

from hyperformer_fast import HyperFormerConfig, parameters
from hyperformer_fast.parameters import GLUE, T5_SHAPES, count, published_config
from hyperformer_fast.variants import HYPERNETWORK_VARIANTS, VARIANTS


def test_the_papers_table_is_reproduced():
    found = {(variant, t5): c.percent_per_task for variant, t5, c, paper in parameters.rows() if paper is not None}
    assert set(found) == set(parameters.PAPER)
    for key, paper in parameters.PAPER.items():
        assert round(found[key], 2) == paper, key


def test_the_readme_says_what_the_papers_row_of_hyperformer_needs():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    call = re.search(r"HyperFormerConfig\(tasks=\.\.\., (variant=\"hyperformer\", .*?)\)", readme)[1]
    fields = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+)=([^,]+)", call)}
    said, small = HyperFormerConfig(tasks=list(GLUE), **fields), T5Config(**T5_SHAPES["T5-small"])
    assert said == published_config("hyperformer")
    default = HyperFormerConfig(tasks=list(GLUE), variant="hyperformer")
    assert f"trains {count(default, small).percent_per_task:.2f} % of T5-small" in readme


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        *((variant, {}) for variant in VARIANTS),
        *((variant, {"task_projector": False, "train_task_embeddings": False}) for variant in HYPERNETWORK_VARIANTS),
        *((variant, {"train_adapters_blocks": False}) for variant in HYPERNETWORK_VARIANTS),
        *((variant, {"freeze_model_but_task_embeddings": True}) for variant in HYPERNETWORK_VARIANTS),
        ("hyperformer", {"conditional_layer_norm": False}),
        ("hyperformer", {"conditional_layer_norm": False, "unfreeze_layer_norms": False}),
        ("adapters", {"unfreeze_layer_norms": False}),
        ("adapters", {"task_to_embeddings": dict.fromkeys(GLUE, "one")}),
    ],
)
def test_counts_are_those_of_a_real_model(variant, changes):
    from transformers import T5ForConditionalGeneration

    from hyperformer_fast import get_hyperformer_model

    t5_config = T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=1, num_heads=2, vocab_size=40)
    config = published_config(variant).replace(reduction_factor=8, **changes)
    counted = count(config, t5_config)
    model = get_hyperformer_model(T5ForConditionalGeneration(t5_config), config)
    assert counted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.t5_total == sum(p.numel() for p in model.t5.parameters())
    assert counted == model.parameter_count()


@pytest.mark.parametrize("name", T5_SHAPES)
def test_lm_head_counts_only_when_trained(name):
    base, head = (
        count(published_config("hyperformer++").replace(unfreeze_lm_head=on), T5Config(**T5_SHAPES[name]))
        for on in (False, True)
    )
    assert head.t5_trained - base.t5_trained == 32128 * T5_SHAPES[name]["d_model"]
