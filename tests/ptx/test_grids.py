"""What launches share: the memory that a kernel may touch, and the choice of blocks."""

from __future__ import annotations

import pytest
import torch

from ptx import Fault, Kernel
from ptx.grids import evenly, indices, memory_of, run_grid

COPY = """
.version 8.0
.target sm_80
.address_size 64

.visible .entry copy(.param .u64 from, .param .u64 to)
{
	.reg .b32 %r<4>;
	.reg .b64 %rd<6>;
	ld.param.u64 %rd1, [from];
	ld.param.u64 %rd2, [to];
	mov.u32 %r1, %ctaid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.u64 %rd4, %rd1, %rd3;
	add.u64 %rd5, %rd2, %rd3;
	ld.global.u32 %r2, [%rd4];
	st.global.u32 [%rd5], %r2;
	ret;
}
"""


def copy(source: torch.Tensor, to: torch.Tensor, blocks: int, **how):
    parameters = {name: t.data_ptr().to_bytes(8, "little") for name, t in (("from", source), ("to", to))}
    memory = memory_of({"source": source, "to": to})
    return run_grid(Kernel(COPY), memory, parameters, (blocks,), 32, 0, **how)


def test_every_block_runs():
    source, to = torch.arange(5.0), torch.full((5,), float("nan"))
    ran = copy(source, to, 5)
    assert torch.equal(to, source) and len(ran.blocks) == 5 and not ran.hazards
    assert ran.grid == (5, 1, 1) and ran.most("global_bytes_written") > 0
    assert max(ran.lines) == COPY.split("\n").index("\tret;") + 1


def test_some_blocks_run():
    source, to = torch.arange(5.0), torch.full((5,), -1.0)
    copy(source, to, 5, only=evenly((5, 1, 1), 2))
    assert to.tolist() == [-1, 1, -1, -1, 4]


@pytest.mark.parametrize("short", ["source", "to"])
def test_a_block_too_many(short):
    """Views end where their own numbers do, not with the tensor that they are views of."""
    tensors = {name: torch.zeros(16)[: 4 if name == short else 16] for name in ("source", "to")}
    copy(tensors["source"], tensors["to"], 4)
    with pytest.raises(Fault, match=short):
        copy(tensors["source"], tensors["to"], 5)


def test_views_of_one_tensor():
    both = torch.arange(8.0)
    copy(both[:4], both[4:], 4)
    assert both.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    copy(both, both, 8)  # and a tensor that is given twice


def test_blocks_are_spread():
    assert indices((2, 2, 1)) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert evenly((2, 2, 1), 9) == indices((2, 2, 1))
    assert evenly((10, 1, 1), 2) == [(4, 0, 0), (9, 0, 0)]
