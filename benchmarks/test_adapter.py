"""Adapter forward and forward+backward against the rivals."""

from __future__ import annotations

import os

import pytest
import torch
from providers import MODELS, PROVIDERS, Case, Unavailable, make

QUICK = os.environ.get("HF_BENCH_QUICK") == "1"
ROWS = (1024,) if QUICK else (128, 1024, 4096, 16384)
REDUCTIONS = (32,) if QUICK else (32, 16, 8)
SIZES = ("T5-base",) if QUICK else tuple(MODELS)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_adapter(benchmark, backward, model, reduction, N, dtype, provider):
    benchmark.group = f"{'forward+backward' if backward else 'forward'} {model} r={reduction} N={N} {dtype}"
    d = MODELS[model]
    try:
        call = make(provider, Case(N, d, d // reduction, dtype), backward)
    except Unavailable as error:
        pytest.skip(str(error))
    benchmark(call)
