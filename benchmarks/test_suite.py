"""Times every entry of the suite by every provider that is installed: `pytest benchmarks/ --benchmark-only`."""

from __future__ import annotations

import pytest
import torch
from providers import Unavailable, Wrong
from suite import suite


def pytest_generate_tests(metafunc):
    entries = suite(metafunc.config.getoption("--full"))
    pairs = [(entry, provider) for entry in entries for provider in entry.providers]
    names = [f"{entry.op}-{entry.shape}-{entry.dtype}-{provider}" for entry, provider in pairs]
    metafunc.parametrize(("entry", "provider"), pairs, ids=names)


def test_suite(benchmark, record_median, entry, provider):
    benchmark.group, benchmark.name = f"{entry.op}, {entry.shape}, {entry.dtype}", provider
    torch.manual_seed(0)
    try:
        call = entry.make(provider)
    except Wrong:
        raise
    except Unavailable as error:
        pytest.skip(str(error))
    benchmark(call)
    record_median(entry, provider)
