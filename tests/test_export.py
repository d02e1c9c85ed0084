"""Exported graphs: the model's logits for any mix of tasks, batch and length, and what a folder says of them."""

from __future__ import annotations

import functools
import hashlib
import json

import pytest
import torch
from support.t5s import TASKS, VARIANTS, tiny_model, tiny_t5
from torch.testing import assert_close
from transformers.models.t5 import modeling_t5

from hyperformer_fast.export import artifact, export_model
from hyperformer_fast.export.artifact import decoded_logits
from hyperformer_fast.export.formats import FORMATS, GRAPHS, Format
from hyperformer_fast.export.graphs import graphs_of
from hyperformer_fast.export.materialize import plain_copy
from hyperformer_fast.export.weights import packed_weights

# Before transformers 5 T5's softmax is in float32, whatever the T5 is in.
TOLERANCE = 1e-9 if hasattr(modeling_t5, "eager_attention_forward") else 1e-5

OF_T5 = ("gated", "tied", "relative_attention_max_distance", "num_layers")


def exportable(variant="hyperformer++", dtype=torch.float32, **changes):
    of_t5 = {name: changes.pop(name) for name in OF_T5 if name in changes}
    return tiny_model(variant, t5=tiny_t5(dtype=dtype, **of_t5), **changes).eval()


def inputs(B=5, L=9, M=6, tasks=(0, 1, 2, -1, 1), seed=3):
    torch.manual_seed(seed)
    mask = torch.ones(B, L, dtype=torch.long)
    mask[0, L // 2 + 1 :] = 0
    return {
        "input_ids": torch.randint(64, (B, L)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(64, (B, M)),
        "task_index": torch.tensor([tasks[i % len(tasks)] for i in range(B)]),
    }


def expected(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def modules(model):
    packed = packed_weights(model, model.hyperformer_config.tasks)
    config = model.hyperformer_config
    return dict(zip(GRAPHS, graphs_of(plain_copy(model), model.hypernetworks, packed, config.non_linearity)))


KINDS = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "gated": {"gated": True, "tied": False},
    "pre-norm": {"add_layer_norm_before_adapter": True, "non_linearity": "gelu"},
    "no norms": {"add_layer_norm_after_adapter": False, "non_linearity": "relu"},
    "norms alone": {"train_adapters_blocks": False, "add_layer_norm_before_adapter": True},
    "far apart": {"relative_attention_max_distance": 40},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_compute_the_model(kind):
    model = exportable(dtype=torch.float64, **KINDS[kind])
    # Longer than the distances that T5 tells apart, so that each bucket is read.
    batch = inputs(L=90, M=45) if kind == "far apart" else inputs()
    assert_close(decoded_logits(modules(model), batch), expected(model, batch), rtol=0, atol=TOLERANCE)


def test_a_sample_without_a_task_and_one_of_an_unknown_task():
    graphs = modules(exportable())
    batch = inputs(B=3, tasks=(0, -1, 3))
    logits = decoded_logits(graphs, batch)
    assert logits[:2].isfinite().all() and logits[2].isnan().all()
    batch["task_index"][2] = -2
    assert decoded_logits(graphs, batch)[2].isnan().all()


def test_samples_may_be_at_different_positions():
    model = exportable()
    graphs, batch = modules(model), inputs(B=2, M=6)
    want = expected(model, batch)
    _, given = artifact._inputs(graphs, batch)
    given = [each.clone() for each in given]
    starts, tokens = [0, 2], batch["decoder_input_ids"]
    with torch.no_grad():
        for step in range(6):  # the second sample begins two steps later
            at = torch.tensor([max(step - start, 0) for start in starts])
            given[0], given[1] = tokens.gather(1, at[:, None])[:, 0], at
            logits, key, value = graphs["decoder"](*given)
            for sample, place in enumerate(at.tolist()):
                given[4][:, sample, :, place] = key[:, sample]
                given[5][:, sample, :, place] = value[:, sample]
                if step >= starts[sample]:
                    assert_close(logits[sample], want[sample, place], rtol=1e-4, atol=1e-5)


@functools.cache
def exported(format, folder):
    for package in FORMATS[format].packages:
        pytest.importorskip(package, reason=f"needs {package}")
    model = exportable(num_layers=1)
    description = export_model(model, folder, format, generation={"stsb": {"max_new_tokens": 3}})
    files = {name: folder / graph["file"] for name, graph in description["graphs"].items()}
    return model, description, {name: FORMATS[format].load(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


SHAPES = {"one sample": (1, 4, 3), "one token": (3, 1, 1), "many": (7, 21, 9)}


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_takes_shapes_that_it_was_not_traced_with(format, shape, folder):
    model, _, graphs = exported(format, folder / format)
    batch = inputs(*SHAPES[shape])
    assert_close(decoded_logits(graphs, batch), expected(model, batch), rtol=1e-4, atol=1e-4)


def test_the_description(folder):
    _, description, _ = exported("torch", folder / "torch")
    assert json.loads((folder / "torch" / "export.json").read_text()) == description
    assert description["tasks"] == TASKS and description["generation"]["stsb"] == {"max_new_tokens": 3}
    assert description["graphs"]["decoder"]["inputs"]["keys"] == [2, "batch", 4, "slots", 8]
    assert description["graphs"]["decoder"]["outputs"]["logits"] == ["batch", 64]
    assert 0 < description["largest_difference"] < 1e-5
    files = {path.name for path in (folder / "torch").iterdir()}
    assert files == {"export.json", *description["files"]}
    for name, said in description["files"].items():
        assert hashlib.sha256((folder / "torch" / name).read_bytes()).hexdigest() == said["sha256"]
    other = exportable(gated=True)
    assert artifact._t5_digest(plain_copy(other)) != description["t5"]["sha256"]


@pytest.fixture
def untraced(monkeypatch):
    """The name of a format that writes modules as they are, because tracing takes seconds."""

    def load(path):
        return torch.load(path, weights_only=False)

    monkeypatch.setitem(FORMATS, "untraced", Format(".pt", lambda module, path, name: torch.save(module, path), load))
    monkeypatch.setattr(artifact, "trace", lambda module, name, inputs: module)
    return "untraced"


def test_chosen_tasks_in_their_own_order(tmp_path, untraced):
    model = exportable()
    description = export_model(model, tmp_path / "two", untraced, tasks=["cola", "mnli"])
    assert description["tasks"] == ["cola", "mnli"]
    graphs = {name: FORMATS[untraced].load(tmp_path / "two" / f"{name}.pt") for name in GRAPHS}
    batch = inputs(tasks=(0, 1, -1))
    of_model = {**batch, "task_index": torch.tensor([2, 0, -1])[batch["task_index"]]}
    assert_close(decoded_logits(graphs, batch), expected(model, of_model), rtol=1e-4, atol=1e-4)


def rolled(module, args, output):
    return output.roll(1, -1)


def test_what_an_export_does_not_see_is_refused(tmp_path, untraced):
    model = exportable()
    model.t5.decoder.block[1].layer[2].register_forward_hook(rolled)
    with pytest.raises(RuntimeError, match="do not give this model's logits"):
        export_model(model, tmp_path / "hooked", untraced)
    assert not list(tmp_path.iterdir())


def test_each_task_is_compared(tmp_path, untraced, monkeypatch):
    tasks = list("abcdefgh")
    model = exportable(tasks=tasks)

    def wrong(model, ids):
        packed = packed_weights(model, ids)
        packed["decoder"][:, -1] *= 1.1
        return packed

    monkeypatch.setattr(artifact, "packed_weights", wrong)
    with pytest.raises(RuntimeError, match="do not give this model's logits"):
        export_model(model, tmp_path / "x", untraced)


REFUSED = {
    "format": ({}, {"format": "tflite"}, "torch, onnx, aoti"),
    "task": ({}, {"tasks": ["rte"]}, "rte"),
    "twice": ({}, {"tasks": ["cola", "cola"]}, "each task once"),
    "half": ({"dtype": torch.bfloat16}, {}, "float32 on a CPU"),
    "finetuning": ({"variant": "finetuning"}, {}, "has no adapters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused(name, tmp_path):
    of_model, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        export_model(exportable(**of_model), tmp_path / "x", **{"format": "torch", **changes})
    assert not list(tmp_path.iterdir())


def test_tasks_may_have_been_removed(tmp_path):
    model = exportable()
    model.remove_task(TASKS[0])
    description = export_model(model, tmp_path / "x", "torch")
    assert description["tasks"] == TASKS[1:]
    graphs = {
        name: FORMATS["torch"].load(tmp_path / "x" / each["file"]) for name, each in description["graphs"].items()
    }
    batch = inputs(tasks=(0, 1, -1))
    logits = decoded_logits(graphs, batch)
    model.renumber_tasks()
    assert_close(logits, expected(model, batch))


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(OSError, match="other files in it"):
        export_model(exportable(), tmp_path, "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "export.json").write_text("{}")  # of an export into which somebody put a file
    with pytest.raises(OSError, match="other files in it than an export writes, thesis.txt for one"):
        export_model(exportable(), tmp_path, "torch")
