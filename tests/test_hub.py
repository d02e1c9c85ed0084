"""To the Hugging Face Hub and back, against a stand-in of it on this machine; and where a T5 is loaded from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.local_hub import COMMIT
from support.old_files import as_version_0_1_0
from support.t5s import TASKS, batch, tiny_config, tiny_model, tiny_t5
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5ForSequenceClassification

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model
from hyperformer_fast.checkpoint import CheckpointError
from hyperformer_fast.tiny import load_tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    pytest.importorskip("datasets", reason="needs datasets")
    folder = tmp_path_factory.mktemp("hub")
    script = ROOT / "tests" / "support" / "local_hub.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pushed_model_comes_back_by_its_id_alone(found):
    assert found["commit"] == "a commit to me/pushed" and found["equal"] and found["config"]
    assert found["files"] == ["README.md", "config.json", "model.safetensors"] == found["saved and pushed"]
    # transformers 5.23 does not tell any more which revision it loaded; the weights are compared in any case.
    known = COMMIT if found["transformers tells revisions"] else None
    assert found["t5's revision"] == found["revision again"] == known


def test_a_card_on_the_hub(found):
    assert "base_model: google/tiny" in found["card"] and "- mine" in found["card"] and "87.50" in found["card"]
    assert found["card by hand"] == "written by hand"


def test_what_is_no_model_of_ours_on_the_hub(found):
    assert "me/absent" in found["me/absent"] and found["me/absent"].startswith("OSError")
    assert "not a HyperFormer checkpoint" in found["google/tiny"]


def test_the_trainer_pushes_too(found):
    assert found["trained"] == [], "tensors that differ"


def test_a_t5_of_a_folder_is_loaded_from_there(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "t5")
    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", dtype=torch.float64, dropout_rate=0.25)
    model = get_hyperformer_model(t5, tiny_config())
    model.save_pretrained(tmp_path / "saved")
    again = HyperFormerModel.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float64 and again.config.dropout_rate == 0.25 and not again.training
    assert torch.equal(again(**batch(), task="cola").logits, model(**batch(), task="cola").logits)
    assert HyperFormerModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16
    shutil.rmtree(tmp_path / "t5")
    with pytest.raises(CheckpointError, match=r"the T5 in .*t5, and there is no such folder here: .*t5=\.\.\."):
        HyperFormerModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_those_of_the_t5(tmp_path, tied):
    tiny_t5(tied=tied).save_pretrained(tmp_path / "t5")
    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    if (t5.lm_head.weight is t5.shared.weight) != tied:
        pytest.skip("this transformers ties every T5's head when it loads it")
    model = get_hyperformer_model(t5, tiny_config())
    model.save_pretrained(tmp_path / "saved")
    again = HyperFormerModel.from_pretrained(tmp_path / "saved")
    assert (again.t5.lm_head.weight is again.t5.shared.weight) == tied
    assert torch.equal(again(**batch(), task="cola").logits, model(**batch(), task="cola").logits)


def test_a_t5_v1_1_described_by_transformers_5_keeps_its_own_head(tmp_path):
    tiny_t5(tied=False).save_pretrained(tmp_path / "t5")
    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    model = get_hyperformer_model(t5, tiny_config())
    expected = model(**batch(), task="cola").logits
    t5.config.tie_word_embeddings, t5.config.scale_decoder_outputs = True, False  # as transformers 5 has them
    model.save_pretrained(tmp_path / "saved")
    again = HyperFormerModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch(), task="cola").logits, expected)


def test_the_embedded_t5_is_known_by_its_name(tmp_path):
    model = get_hyperformer_model(load_tiny()[0], tiny_config())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_model"]["name_or_path"] == "embedded"
    again = HyperFormerModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("sizes", ["other sizes", "the same sizes"])
def test_the_embedded_t5_of_an_earlier_version_is_refused(tmp_path, sizes):
    embedded, _ = load_tiny()
    t5 = tiny_t5() if sizes == "other sizes" else load_tiny()[0]
    t5.config.name_or_path = embedded.config.name_or_path
    with torch.no_grad():
        t5.shared.weight.mul_(1.5)
    get_hyperformer_model(t5, tiny_config()).save_pretrained(tmp_path)
    told = "It names the embedded T5, which was another in an earlier version of this library: train again"
    for given in ({}, {"t5": embedded}):
        with pytest.raises(CheckpointError, match=f"was trained on another T5: .*{told}"):
            HyperFormerModel.from_pretrained(tmp_path, **given)


def test_a_classifier_is_loaded_with_its_labels(tmp_path):
    tiny_t5(dtype=torch.float32).save_pretrained(tmp_path / "t5")
    t5 = T5ForSequenceClassification.from_pretrained(tmp_path / "t5", num_labels=5)
    model = get_hyperformer_model(t5, tiny_config())
    model.save_pretrained(tmp_path / "saved")
    again = HyperFormerModel.from_pretrained(tmp_path / "saved")
    assert type(again.t5) is T5ForSequenceClassification and again.config.num_labels == 5
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_t5_that_has_no_name_is_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a T5 that was not loaded from anywhere: pass it"):
        HyperFormerModel.from_pretrained(tmp_path)
    for wrong in ("t5-base", 3):
        with pytest.raises(TypeError, match=f"t5 must be a T5, got {wrong!r}"):
            HyperFormerModel.from_pretrained(tmp_path, t5=wrong)
    with pytest.raises(TypeError, match="dtype is for loading the T5, which is given"):
        HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5(), dtype=torch.float32)


def test_the_old_order_of_arguments_warns(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for arguments, named in (((tiny_t5(), tmp_path), {}), ((), {"t5": tiny_t5(), "directory": tmp_path})):
        with pytest.warns(DeprecationWarning, match=r"is now from_pretrained\(directory, t5=t5\)"):
            again = HyperFormerModel.from_pretrained(*arguments, **named)
        assert torch.equal(again(**batch(), task="cola").logits, model(**batch(), task="cola").logits)


def test_old_files_load_and_are_replaced(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    as_version_0_1_0(tmp_path)
    again = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    assert torch.equal(again(**batch(), task="cola").logits, model(**batch(), task="cola").logits)
    assert HyperFormerConfig.from_pretrained(tmp_path) == model.hyperformer_config
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_old_files_beside_the_t5s_own_load(tmp_path):
    """As with the old names they could lie."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    as_version_0_1_0(tmp_path)
    tiny_t5().save_pretrained(tmp_path)
    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    again = HyperFormerModel.from_pretrained(tmp_path, t5=t5)
    assert torch.equal(again(**batch(), task="cola").logits, model(**batch(), task="cola").logits)
    assert HyperFormerConfig.from_pretrained(tmp_path) == model.hyperformer_config
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the folder that the T5 was loaded from"):
        again.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_configuration_is_saved_and_read(tmp_path):
    config = tiny_config(variant="hyperformer", non_linearity="relu")
    config.save_pretrained(tmp_path / "new")
    assert HyperFormerConfig.from_pretrained(tmp_path / "new") == config
    config.replace(tasks=TASKS[:1]).save_pretrained(tmp_path / "new")
    assert HyperFormerConfig.from_pretrained(tmp_path / "new").tasks == TASKS[:1]
    tiny_t5().config.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="config.json is the configuration of a t5: save to another folder"):
        config.save_pretrained(tmp_path / "t5")
    with pytest.raises(OSError):
        HyperFormerConfig.from_pretrained(tmp_path / "absent")
