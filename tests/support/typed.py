"""A user's script with misspelt keywords, and what mypy must say of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
from hyperformer_fast import FusedHyperAdapter, HyperFormerConfig, get_hyperformer_model

config = HyperFormerConfig(tasks=["mnli"], reduction_facter=32)
adapter = FusedHyperAdapter(input_dim=8, down_sample_size=2, embedding_dim=4, nonlinearity="relu")
reveal_type(get_hyperformer_model)
"""

EXPECTED = (
    'Unexpected keyword argument "reduction_facter" for "HyperFormerConfig"',
    'Unexpected keyword argument "nonlinearity" for "FusedHyperAdapter"',
    "config: hyperformer_fast.config.HyperFormerConfig, fuse: ",
    ") -> hyperformer_fast.model.HyperFormerModel",
    "Found 2 errors in 1 file",
)


def check_types(python: str | Path, folder: Path, cache: Path = ROOT / ".mypy_cache") -> None:
    """Assert that the mypy of ``python`` finds the mistakes, with the package as it is installed there.

    Args:
        python: an interpreter whose environment has the package and mypy.
        folder: where to write the script and to run; not the repository, where mypy would read the sources instead of
            the installation.
        cache: mypy's cache; the default is the repository's, in which torch is already analysed.
    """
    (folder / "script.py").write_text(SCRIPT)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache)]
    command = [str(python), "-m", "mypy", *options, "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for line in EXPECTED:
        assert line in done.stdout, done.stdout + done.stderr
