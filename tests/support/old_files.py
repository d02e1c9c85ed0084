"""Checkpoints as earlier versions of the library wrote them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyperformer_fast.checkpoint import CONFIG_NAME, DESCRIPTION, DIGEST, WEIGHTS_NAME, save_checkpoint


def as_version_0_1_0(folder: Path) -> None:
    """Replace a saved model's files by those of version 0.1.0, which have no digests."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        description = json.loads(file.metadata()["hyperformer"])
    base = description["base_model"]
    for field in ("revision", "dtype", "config", "frozen"):
        del base[field]
    del description[DIGEST]
    held = load_file(folder / WEIGHTS_NAME)
    del held[DESCRIPTION]
    save_file(held, folder / "hyperformer.safetensors", {"hyperformer": json.dumps(description)})
    (folder / "hyperformer_config.json").write_text(json.dumps(description))
    for name in (WEIGHTS_NAME, CONFIG_NAME, "README.md"):
        (folder / name).unlink()


def without_recipe(folder: Path) -> None:
    """Replace a saved model's files by those of a version that had no recipes."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        description = json.loads(file.metadata()["hyperformer"])
    for name in ("recipe", "init_weights", "zero_delta", "normalize_embeddings"):
        del description["config"][name]
    held = load_file(folder / WEIGHTS_NAME)
    del description[DIGEST], held[DESCRIPTION]
    save_checkpoint(folder, held, description)
