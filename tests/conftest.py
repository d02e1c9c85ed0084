"""Shared set-up: uninitialised memory is poisoned, and real data and models are found or their absence is named."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

# datasets reads this when it is imported. pytest-xdist's workers and other processes inherit it.
_CACHE = None if "HYPERFORMER_FAST_TEST_CACHE" in os.environ else tempfile.mkdtemp(prefix="hyperformer-fast-datasets-")
if _CACHE is not None:
    os.environ["HYPERFORMER_FAST_TEST_CACHE"] = os.environ["HF_DATASETS_CACHE"] = _CACHE

# torch.empty* then comes filled with NaN (or the largest integer): a kernel that reads what nobody wrote is seen.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

_OF_ACCELERATE = ("ACCELERATE_", "FSDP_")


def pytest_unconfigure():
    if _CACHE is not None:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _settings_stay_in_a_test():
    """TrainingArguments write some of theirs (FSDP, precision) to the environment, where processes that a later test
    starts would find them."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_OF_ACCELERATE)}
    yield
    for name in [name for name in os.environ if name.startswith(_OF_ACCELERATE)]:
        if name not in before:
            del os.environ[name]
    os.environ.update(before)


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
