"""Loads, stores, address spaces and cp.async; every access is checked for bounds, alignment and order."""

import numpy as np
import pytest

from .block import Block
from .fault import Fault
from .memory import Memory
from .parse import Kernel
from .programs import HEADER, REGISTERS, compute, kernel_text, run

TID = "mov.u32 %r0, %tid.x;"


def test_vectors_and_sizes():
    x = np.arange(32 * 4, dtype=np.uint32)
    out = np.zeros_like(x)
    run(f"""{TID}
        mad.wide.u32 %d0, %r0, 16, %x;
        mad.wide.u32 %d1, %r0, 16, %out;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d0];
        st.global.v2.b32 [%d1], {{%r4, %r3}};
        st.global.v2.b32 [%d1+8], {{%r2, %r1}};""", x=x, out=out)  # fmt: skip
    assert out.reshape(32, 4).tolist() == x.reshape(32, 4)[:, ::-1].tolist()


@pytest.mark.parametrize(
    "type_, expected", [("s8", -2), ("u8", 0xFE), ("s16", -258), ("u16", 0xFEFE), ("b32", 0xFEFEFEFE - 2**32)]
)
def test_narrow_loads_extend_by_their_sign(type_, expected):
    x = np.array([0xFEFEFEFE] * 32, np.uint32)
    out = np.zeros(32, np.int32)
    run(f"{TID} mad.wide.u32 %d0, %r0, 4, %out; ld.global.{type_} %r1, [%x]; st.global.b32 [%d0], %r1;", x=x, out=out)
    assert out.tolist() == [expected] * 32


def test_narrow_stores_write_the_low_bits_alone():
    out = np.zeros(128, np.uint8)
    block = run(f"{TID} cvt.u64.u32 %d0, %r0; shl.b64 %d0, %d0, 2; add.s64 %d0, %d0, %out;"
                "mov.u32 %r1, 0x11223344; st.global.u8 [%d0+1], %r1; st.global.u16 [%d0+2], %r1;", out=out)  # fmt: skip
    assert out.reshape(32, 4).tolist() == [[0, 0x44, 0x44, 0x33]] * 32
    assert block.counts["global_bytes_written"] == 96 and block.counts["global_bytes_read"] == 0


@pytest.mark.parametrize(
    "body, what",
    [
        ("ld.global.b32 %r1, [%x+128];", "read out of bounds: address .* 0 bytes after the end of x"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%x+116];", "misaligned read of 16 bytes"),
        ("st.global.b32 [%x+-4], %r0;", "write out of bounds: .*4 bytes before x"),
        ("ld.global.b32 %r1, [%x+2];", "misaligned read of 4 bytes"),
        ("ld.global.v2.b32 {%r1, %r2}, [%x+128];", "out of bounds"),
        ("ld.shared.b32 %r1, [memory+64];", "shared read out of bounds: 4 bytes at offset 64 of 64"),
        ("st.shared.b32 [memory+62], %r0;", "shared write out of bounds"),
        ("st.shared.b16 [memory+1], %h0;", "misaligned shared write"),
        ("mov.u32 %r1, memory; sub.s32 %r1, %r1, 4; ld.shared.b32 %r2, [%r1];", "shared read out of bounds"),
        ("mov.u64 %d0, 64; ld.global.b32 %r1, [%d0];", "address 0x40 lies in no tensor"),
        ("ld.local.b32 %r1, [stack+16];", "local read out of bounds"),
        ("ld.param.b32 %r1, [p_x+8];", "outside the parameters"),
        ("mov.u64 %d0, 0x7000000000000000; ld.b32 %r1, [%d0];", "lies in no space"),
    ],
)
def test_accesses_out_of_bounds(body, what):
    with pytest.raises(Fault, match=what):
        run(f"{TID} {body}", shared=64, declarations=".local .align 16 .b8 stack[16];", x=np.zeros(32, np.uint32))


def test_one_lane_out_of_bounds_is_enough():
    x, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(Fault, match="read out of bounds"):
        run(f"{TID} add.s32 %r1, %r0, 1; mad.wide.u32 %d0, %r1, 4, %x; ld.global.b32 %r2, [%d0];", x=x, out=out)
    # Guarded, the lane does not read.
    run(f"{TID} add.s32 %r1, %r0, 1; setp.lt.u32 %p0, %r1, 32; mad.wide.u32 %d0, %r1, 4, %x;"
        "@%p0 ld.global.b32 %r2, [%d0];", x=x, out=out)  # fmt: skip


def test_lanes_may_read_different_tensors():
    x, y, out = np.arange(32, dtype=np.uint32), np.arange(32, dtype=np.uint32) + 100, np.zeros(32, np.uint32)
    run(
        f"""{TID} setp.lt.u32 %p0, %r0, 10; selp.b64 %d0, %x, %y, %p0; mad.wide.u32 %d0, %r0, 4, %d0;
        ld.global.b32 %r1, [%d0]; mad.wide.u32 %d1, %r0, 4, %out; st.global.b32 [%d1], %r1;""",
        x=x, y=y, out=out,
    )  # fmt: skip
    assert out.tolist() == [*range(10), *range(110, 132)]


def test_memory_that_is_read_only_or_not_yet_written():
    text = kernel_text(
        """st.global.b32 [%x+4], 7; ld.global.b32 %r0, [%x+4];
        st.global.b32 [%y+4], 7; ld.global.b32 %r0, [%y+4]; ld.global.b32 %r0, [%y];""",
        ["x", "y"],
    )
    x, y = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    parameters = {"p_x": np.uint64(x.ctypes.data).tobytes(), "p_y": np.uint64(y.ctypes.data).tobytes()}

    def attempt(**flags):
        memory = Memory()
        memory.add_array(x, "x", **flags)
        memory.add_array(y, "y", initialised="initialised" not in flags)
        Block(Kernel(text), memory, parameters, (0, 0, 0), (1, 1, 1), 32).run()

    attempt()
    with pytest.raises(Fault, match="write to x, which the kernel may only read"):
        attempt(writable=False)
    with pytest.raises(Fault, match="read of byte 0 of y, which nothing has written"):
        attempt(initialised=False)


def test_address_spaces():
    out = np.zeros(32, np.uint32)
    run(f"""{TID}
        mov.u64 %d0, memory; cvta.shared.u64 %d1, %d0;        // generic address of shared memory
        mad.wide.u32 %d1, %r0, 4, %d1; mul.lo.s32 %r1, %r0, 3;
        st.b32 [%d1], %r1;
        cvta.to.shared.u64 %d2, %d1; cvt.u32.u64 %r2, %d2; ld.shared.b32 %r3, [%r2];
        mov.u64 %d3, stack; cvta.local.u64 %d4, %d3;          // each lane has its own stack
        st.b32 [%d4+4], %r3; ld.local.b32 %r4, [%d3+4];
        isspacep.shared %p0, %d1; isspacep.local %p1, %d4; isspacep.global %p2, %out; isspacep.global %p3, %d1;
        and.pred %p0, %p0, %p1; and.pred %p0, %p0, %p2; not.pred %p3, %p3; and.pred %p0, %p0, %p3;
        selp.b32 %r5, %r4, -1, %p0;
        mad.wide.u32 %d5, %r0, 4, %out; st.b32 [%d5], %r5;""",
        shared=128, declarations=".local .align 8 .b8 stack[16];", out=out)  # fmt: skip
    assert out.tolist() == [3 * i for i in range(32)]


def test_parameters_shared_variables_and_constants():
    out = np.zeros(4, np.uint32)
    text = (
        f"{HEADER}.const .align 4 .b32 table[3] = {{5, 0x10, -1}};\n"
        ".extern .shared .align 16 .b8 dynamic[];\n"
        ".visible .entry other(.param .u32 q) { ret; }\n"
        ".visible .entry k(.param .align 8 .b8 struct[24], .param .s16 small)\n"
        f"{{{REGISTERS}.shared .align 4 .b8 fixed[20];\n"
        "ld.param.u64 %d0, [struct+8]; mov.b64 %d1, struct; ld.param.v2.u32 {%r0, %r1}, [%d1+16];\n"
        "ld.param.s16 %r2, [small]; add.s32 %r2, %r2, %r1; ld.const.b32 %r3, [table+4];\n"
        "mov.u32 %r4, dynamic; mov.u32 %r5, fixed; sub.s32 %r4, %r4, %r5;\n"
        "st.global.v4.b32 [%d0], {%r0, %r2, %r3, %r4}; ret; }\n"
    )
    kernel = Kernel(text, "k")
    assert kernel.parameters == [("struct", "b8", 24), ("small", "s16", 2)] and kernel.static_shared == 20
    with pytest.raises(Fault, match="several entries"):
        Kernel(text)
    with pytest.raises(Fault, match="no entry absent"):
        Kernel(text, "absent")
    memory = Memory()
    struct = np.array([0, memory.add_array(out, "out"), 9 | 50 << 32], np.uint64)
    values = {"struct": struct.tobytes(), "small": np.int16(-3).tobytes()}
    Block(kernel, memory, values, (0, 0, 0), (1, 1, 1), 32, 64).run()
    assert out.tolist() == [9, 47, 16, 32]
    with pytest.raises(Fault, match="parameter small has 2 bytes, not 4"):
        Block(kernel, memory, {**values, "small": bytes(4)}, (0, 0, 0), (1, 1, 1), 32, 64).run()


def test_special_registers():
    out = np.zeros((64, 4), np.uint32)
    names = ["%tid.x", "%tid.y", "%laneid", "%warpid", "%ctaid.y", "%nctaid.x", "%ntid.x", "%lanemask_lt"]
    text = kernel_text(
        "mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mad.lo.s32 %r2, %r1, 16, %r0; mad.wide.u32 %d0, %r2, 16, %out;"
        + "".join(f"mov.u32 %r{10 + i}, {name};" for i, name in enumerate(names[:4]))
        + "st.global.v4.b32 [%d0], {%r10, %r11, %r12, %r13};"
        + "".join(f"mov.u32 %r{10 + i}, {name};" for i, name in enumerate(names[4:]))
        + "st.global.v4.b32 [%d0+1024], {%r10, %r11, %r12, %r13};",
        ["out"],
    )
    out = np.zeros((2, 64, 4), np.uint32)
    memory = Memory()
    values = {"p_out": np.uint64(memory.add_array(out, "out")).tobytes()}
    kernel = Kernel(text)
    for y in (3, 4):  # the second block sees its own index
        Block(kernel, memory, values, (0, y, 0), (7, 9, 1), (16, 4, 1)).run()
        assert out[0].tolist() == [[t % 16, t // 16, t % 32, t // 32] for t in range(64)]
        assert out[1].tolist() == [[y, 7, 16, (1 << t % 32) - 1] for t in range(64)]


def test_moves_pack_and_unpack():
    x = np.array([0x1122334455667788] * 32, np.uint64)
    assert compute("mov.b64 {{%r1, %r2}}, {0}; mov.b64 {d}, {{%r2, %r1}};", np.uint64, x)[0] == 0x5566778811223344
    assert compute("mov.b64 {{_, {d}}}, {0};", np.uint32, x)[0] == 0x11223344
    assert compute("mov.b64 {{%h1, %h2, %h3, %h4}}, {0}; mov.b32 {d}, {{%h4, %h1}};", np.uint32, x)[0] == 0x77881122
    # A destination that is also the source.
    assert compute("mov.b32 %r1, 0x12345678; mov.b32 {{%h1, %h2}}, %r1; mov.b32 %r1, {{%h2, %h1}}; mov.b32 {d}, %r1;",
                   np.uint32, x)[0] == 0x56781234  # fmt: skip


# cp.async ------------------------------------------------------------------------

COPY = f"""{TID}
    mad.wide.u32 %d0, %r0, 16, %x; shl.b32 %r1, %r0, 4; mov.u32 %r2, memory; add.s32 %r2, %r2, %r1;
    cp.async.cg.shared.global [%r2], [%d0], 16; cp.async.commit_group;
    cp.async.cg.shared.global [%r2+512], [%d0+512], 0x10; cp.async.commit_group;
"""
READ = """
    mad.wide.u32 %d1, %r0, 16, %out;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2]; st.global.v4.b32 [%d1], {%r4, %r5, %r6, %r7};
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2+512]; st.global.v4.b32 [%d1+512], {%r4, %r5, %r6, %r7};
"""


def copied(wait: str, body: str = COPY, hazards: bool = True):
    x, out = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    block = run(f"{body} {wait} {READ}", shared=1024, hazards=hazards, x=x, out=out)
    return x, out, block


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_asynchronous_copies_land_at_their_wait(wait):
    x, out, block = copied(wait)
    assert out.tolist() == x.tolist() and not block.hazards


def test_a_wait_that_leaves_a_group_in_flight_shows():
    x, out, block = copied("cp.async.wait_group 1;")
    assert out[:128].tolist() == x[:128].tolist() and (out[128:] == 0xFFFFFFFF).all()
    assert any("reads an asynchronous copy not waited for" in h for h in block.hazards)
    assert any("ends with asynchronous copies" in h for h in block.hazards)
    _, out, _ = copied("", hazards=False)
    assert (out == 0xFFFFFFFF).all()


def test_a_barrier_does_not_replace_the_wait():
    _, out, block = copied("bar.sync 0;")
    assert (out == 0xFFFFFFFF).all()
    assert any("reads an asynchronous copy not waited for" in h for h in block.hazards)


def test_wait_group_does_not_wait_for_copies_that_are_not_committed():
    body = COPY.rsplit("cp.async.commit_group;", 1)[0]
    x, out, _ = copied("cp.async.wait_group 0;", body)
    assert out[:128].tolist() == x[:128].tolist() and (out[128:] == 0xFFFFFFFF).all()
    x, out, _ = copied("cp.async.wait_all;", body)
    assert out.tolist() == x.tolist()


@pytest.mark.parametrize("amount", [0, 4, 16])
def test_asynchronous_copies_fill_with_zeros_what_they_do_not_read(amount):
    x, out = np.arange(1, 129, dtype=np.uint32), np.zeros(128, np.uint32)
    run(f"""{TID} mad.wide.u32 %d0, %r0, 16, %x; shl.b32 %r1, %r0, 4; mov.u32 %r2, memory; add.s32 %r2, %r2, %r1;
        mov.u32 %r3, {amount}; cp.async.ca.shared.global [%r2], [%d0], 16, %r3; cp.async.wait_all;
        mad.wide.u32 %d1, %r0, 16, %out; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2];
        st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};""", shared=512, x=x, out=out)  # fmt: skip
    expected = x.reshape(32, 4).copy()
    expected[:, amount // 4 :] = 0
    assert out.reshape(32, 4).tolist() == expected.tolist()


def test_a_copy_of_nothing_may_have_any_address():
    x = np.zeros(4, np.uint32)
    run("mov.u64 %d0, 0x1000; mov.u32 %r3, 0; cp.async.cg.shared.global [memory], [%d0], 16, %r3; cp.async.wait_all;",
        shared=512, x=x)  # fmt: skip
    with pytest.raises(Fault, match="lies in no tensor"):
        run("mov.u64 %d0, 0x1000; cp.async.cg.shared.global [memory], [%d0], 16;", shared=512, x=x)


@pytest.mark.parametrize("body, what", [
    ("cp.async.bulk.commit_group;", "the modifier .bulk is not known|bulk copies"),
    ("mbarrier.init.shared.b64 [memory], 1;", "the instruction mbarrier is not known"),
    ("ld.global.b128 %d0, [%x];", "expected 1 type"),
    ("ld.global.unheard.b32 %r0, [%x];", "the modifier .unheard is not known"),
    ("fence.proxy.tensormap.sys;", "not known"),
])  # fmt: skip
def test_what_is_not_known_is_refused(body, what):
    with pytest.raises(Fault, match=what):
        run(body, shared=64, x=np.zeros(32, np.uint32))


def test_atomics_on_global_and_shared_memory():
    x, out = np.zeros(4, np.uint32), np.zeros(32, np.uint32)
    block = run(f"""{TID} setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.b32 [memory], 100; bar.sync 0;
        atom.global.add.u32 %r1, [%x], 2; atom.global.cas.b32 %r9, [%x+8], 0, 77; red.global.max.u32 [%x+4], %r0;
        atom.shared.add.u32 %r2, [memory], 1; atom.global.exch.b32 %r8, [%x+12], %r0;
        mad.wide.u32 %d0, %r0, 4, %out; st.global.b32 [%d0], %r1; bar.sync 0;
        ld.shared.b32 %r3, [memory]; @%p0 st.global.b32 [%x+4], %r3;""", shared=64, x=x, out=out)  # fmt: skip
    assert x.tolist() == [64, 132, 77, 31] and out.tolist() == [2 * i for i in range(32)]
    assert block.counts["atomics"] == 5 and not block.hazards


def test_atomic_addition_of_floats():
    x = np.zeros(4, np.float32)
    run("red.global.add.f32 [%x], 0f3F000000; atom.add.f32 %r0, [%x+4], 0f3F800000;", x=x)
    assert x.tolist() == [16, 32, 0, 0]
