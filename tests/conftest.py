"""Shared set-up: uninitialised memory is poisoned, and real data and models are found or their absence is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# torch.empty* then comes filled with NaN (or the largest integer): a kernel that reads what nobody wrote is seen.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared():
    """A function from a relative path to real data or a model beside the repository; skips, by name, where it is
    absent."""
    root = Path(os.environ.get("HYPERFORMER_FAST_SHARED", Path(__file__).parents[2] / "shared"))

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            pytest.skip(f"needs {relative} below HYPERFORMER_FAST_SHARED, which is absent")
        return path

    return find
