"""What the Triton kernels compile to, for GPUs that are not there (tools/triton_gate.py has every combination)."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture(scope="module")
def triton_gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        yield importlib.import_module("triton_gate")


@pytest.fixture(scope="module")
def triton_launches(triton_gate):
    return importlib.import_module("triton_launches")


@pytest.mark.parametrize(("arch", "dtypes"), [(80, ["bf16"]), (90, ["bf16", "fp16", "fp32", "tf32"]), (100, ["bf16"])])
def test_no_spills_and_tensor_cores(triton_gate, arch, dtypes):
    compiled = list(triton_gate.gate(["base"], dtypes, [arch]))
    assert len({result.kernel for result in compiled}) == 8
    rounded = [result for result in compiled if result.dtype == "tf32"]
    assert len(rounded) == ("tf32" in dtypes) * 3 and all(result.tf32 for result in rounded)
    recorded = triton_gate.recorded()
    for result in compiled:
        assert not triton_gate.faults(result), f"{result}: {triton_gate.faults(result)}"
        assert result.blocks >= recorded[triton_gate.key(result)], f"{result}: fewer blocks than recorded"


def test_combinations_cover_every_pair_of_settings(triton_gate):
    combinations = importlib.import_module("triton_combinations")
    chosen = list(combinations.covering())
    assert len(chosen) < 16
    for (one, first), (other, second) in itertools.combinations(combinations.SETTINGS.items(), 2):
        seen = {(settings[one], settings[other]) for settings in chosen}
        assert seen == set(itertools.product(first, second)), (one, other)


def test_what_some_versions_of_triton_do_not_compile(triton_gate, triton_launches):
    """No 16 bits are converted to float64, and no float64 product is wider than 32 columns."""
    for masters, b in ((torch.bfloat16, 24), (torch.float16, 64), (torch.float32, 128)):
        for launch in triton_gate.launches_of(768, b, torch.bfloat16, 100, masters=masters):
            if launch.kernel.__name__ in ("gram_kernel", "fold_kernel"):
                assert triton_launches.signature_of(launch)[0]["PACKED"] == "*fp32"
                assert launch.arguments.get("BJ", 0) <= 32


def test_a_problem_of_another_triton_is_reported(triton_gate, tmp_path, monkeypatch, capsys):
    """A kernel that does not compile, and a process that ends, are rows of the table; the rest is there."""
    combinations = importlib.import_module("triton_combinations")
    good = {"kernel": "fold", "arch": 80, "combination": "dtype=bf16", "problem": ""}
    (tmp_path / "sitecustomize.py").write_text(
        "import json, sys\n"
        "if sys.argv[-1] in ('80', '90'):\n"
        f"    print('9.9', json.dumps({good!r}), sep='\\n')\n"
        "    bad = {'kernel': 'gram', 'arch': 80, 'combination': 'dtype=fp16', 'problem': 'CompilationError: no'}\n"
        "    print(json.dumps(bad), flush=True)\n"
        "    import os; os._exit(0 if sys.argv[-1] == '80' else 3)\n"
    )
    written = {}
    other = {"triton": "9.8", "arch": 90, "kernels": 2, "problems": "none"}
    monkeypatch.setattr(combinations.records, "read", lambda name: [other, {**other, "triton": "9.9", "arch": 80}])
    monkeypatch.setattr(combinations.records, "write", lambda name, title, command, rows: written.update(rows=rows))
    assert combinations.main([tmp_path], [80, 90], write=True) == 1
    assert "gram (dtype=fp16): CompilationError: no" in capsys.readouterr().out
    kept, whole, ended = written["rows"]
    assert kept == other
    assert whole == {"triton": "9.9", "arch": 80, "kernels": 2, "problems": "gram (dtype=fp16): CompilationError: no"}
    assert ended["kernels"] == 2 and ended["problems"].endswith("exit status 3")


def test_faults_are_found(triton_gate, triton_launches):
    """A tile that spills, and rows whose starts are not aligned."""
    from hyperformer_fast.kernels import tiles

    with tiles.forced("forward", tiles.Tile(64, 128, 4, 2)):
        launches = triton_gate.launches_of(768, 24, torch.float32, 80)
    forward = next(launch for launch in launches if launch.kernel.__name__ == "adapter_forward_kernel")
    assert triton_gate.measure(triton_launches.compile_launch(forward, 80), 80)["spills"]

    forward = next(
        launch
        for launch in triton_gate.launches_of(768, 24, torch.bfloat16, 90)
        if launch.kernel.__name__ == "adapter_forward_kernel"
    )
    aligned = triton_gate.measure(triton_launches.compile_launch(forward, 90), 90)
    forward.arguments["ALIGN"] = 1
    ragged = triton_gate.measure(triton_launches.compile_launch(forward, 90), 90)
    assert ragged["wide_loads"] < aligned["wide_loads"]


@pytest.mark.parametrize("arch", [80, 90])
def test_kept_rows_go_straight_into_tensor_cores(triton_gate, triton_launches, arch):
    """The rows and the weight of the first product reach the tensor cores without shared memory, and only the warps'
    sums and the bottleneck wait at barriers (docs/design.md)."""
    barriers = {}
    for launch in triton_gate.launches_of(768, 24, torch.bfloat16, arch):
        name = launch.kernel.__name__.removesuffix("_kernel")
        if name in ("adapter_forward", "rows"):
            assert launch.arguments["KEEP"]
            ptx = triton_launches.compile_launch(launch, arch).asm["ptx"]
            barriers[name] = len(re.findall(r"\bbar(?:rier)?\.sync", ptx))
            if name == "adapter_forward":
                first, *_, last = (match.start() for match in re.finditer(r"\bmma\.sync", ptx))
                before, during = ptx[:first], ptx[first:last]
                assert "st.shared" not in before and "ldmatrix" not in before
                assert "ldmatrix.sync.aligned.m8n8.x4.trans" not in during  # nor does the second weight
    assert barriers["adapter_forward"] <= 16 and barriers["rows"] <= 30, barriers


def test_no_length_is_compiled_in(triton_gate):
    """A batch of another size, or another number of tasks, must find the kernels that are there."""

    def constants(launch):
        names = [parameter.name for parameter in launch.kernel.params if parameter.is_constexpr]
        return launch.kernel.__name__, {name: launch.arguments[name] for name in names}

    def keys(rows, B):
        return [constants(launch) for launch in triton_gate.launches_of(768, 24, torch.bfloat16, 90, rows=rows, B=B)]

    expected = keys(64, 4)
    assert len(expected) == 8
    for rows, B in ((1, 1), (16, 2), (33, 4), (1000, 7)):
        assert keys(rows, B) == expected
    for launch in triton_gate.launches_of(768, 24, torch.bfloat16, 90):
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, f"{launch.kernel.__name__} is compiled anew for {parameter.name}"
