"""What threads do together: divergence, barriers, shuffles, votes, and the hazards of shared memory."""

import numpy as np
import pytest

from .fault import Fault
from .programs import run

TID = "mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid; mad.wide.u32 %d0, %r0, 4, %out;"


def lanes(body: str, threads: int = 32, **options):
    """Run a body that leaves its result in %r2, and return it per thread, with the block."""
    out = np.zeros(threads, np.uint32)
    block = run(f"{TID} {body} st.global.b32 [%d0], %r2;", threads, out=out, **options)
    return out.tolist(), block


# control ------------------------------------------------------------------------


def test_branches_loops_and_early_exits():
    got, block = lanes("""
        mov.u32 %r2, 0; mov.u32 %r3, 0;
    $loop: setp.ge.u32 %p0, %r3, %r0; @%p0 bra $done;
        add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; bra.uni $loop;
    $done: setp.eq.u32 %p1, %r0, 5; @%p1 exit;
        @!%p1 add.s32 %r2, %r2, 1000;""", threads=64)  # fmt: skip
    assert got == [0 if t == 5 else t * (t - 1) // 2 + 1000 for t in range(64)]
    assert block.counts["instructions"] > 5 * 63


def test_a_block_need_not_fill_its_last_warp():
    got, block = lanes("mov.u32 %r2, %ntid.x; bar.sync 0;", threads=40)
    assert got == [40] * 40 and block.counts["barriers"] == 1


def test_converged_and_diverged_instructions_are_counted_alike():
    _, together = lanes("mov.u32 %r2, 1; add.s32 %r2, %r2, 1;", threads=128)
    # 3 of the prologue, its pointer, 2, the store and ret.
    assert together.counts["instructions"] == 8 and together.counts["warp_instructions"] == 32
    _, apart = lanes(
        "mov.u32 %r2, 1; setp.lt.u32 %p0, %r0, 32; @%p0 bra $skip; add.s32 %r2, %r2, 1; $skip:", threads=128
    )
    # The add runs for three of four warps.
    assert apart.counts["instructions"] == 10 and apart.counts["warp_instructions"] == 39


def test_an_endless_loop_is_stopped():
    with pytest.raises(Fault, match="more than 1000 instructions: does the kernel wait for another block"):
        lanes("$again: bra $again;", limit=1000)


def test_registers_of_inner_scopes_are_apart_and_labels_may_stand_within():
    got, _ = lanes("{ .reg .b32 t; .reg .pred p; mov.u32 t, 7; setp.eq.u32 p, t, 7; @p mov.u32 %r2, t; }"
                   "{ .reg .b32 t; mov.u32 t, 1; add.s32 %r2, %r2, t; }")  # fmt: skip
    assert got == [8] * 32


def test_a_trap_is_reported():
    with pytest.raises(Fault, match="line .*trap: trap"):
        lanes("setp.eq.u32 %p0, %r0, 3; @%p0 trap;")


# barriers -----------------------------------------------------------------------


def test_an_unreached_barrier_is_reported():
    with pytest.raises(Fault, match=r"unreached barrier: barrier 0 \(line \d+\): 32 of 64 threads"):
        lanes("setp.lt.u32 %p0, %r0, 32; @%p0 bra $skip; bar.sync 0; bra $end; $skip: bar.sync 1; $end:", threads=64)


def test_threads_that_have_ended_are_not_waited_for():
    got, _ = lanes("mov.u32 %r2, 4; setp.ge.u32 %p0, %r0, 32; @%p0 exit; bar.sync 0;", threads=64)
    assert got == [4] * 32 + [0] * 32


def test_lanes_of_a_warp_must_reach_an_aligned_barrier_together():
    with pytest.raises(Fault, match="wait for others that never come"):
        lanes("setp.lt.u32 %p0, %r0, 16; @%p0 bar.sync 0;")
    body = "setp.lt.u32 %p0, %r0, 16; @%p0 bra $a; {0}; bra $b; $a: {0}; $b: mov.u32 %r2, 1;"
    with pytest.raises(Fault, match="wait for others that never come"):
        lanes(body.format("bar.sync 0"))
    assert lanes(body.format("barrier.sync 0"))[0] == [1] * 32


PRODUCE = """
    mov.u32 %r3, memory; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4; add.s32 %r6, %r0, 32; and.b32 %r6, %r6, 127;
    shl.b32 %r6, %r6, 2; add.s32 %r6, %r3, %r6;
"""


def test_a_missing_barrier_is_a_hazard():
    body = PRODUCE + "st.shared.b32 [%r5], %r0; {} ld.shared.b32 %r2, [%r6];"
    got, block = lanes(body.format("bar.sync 0;"), 128, shared=512)
    assert got == [(t + 32) % 128 for t in range(128)] and not block.hazards
    _, block = lanes(body.format(""), 128, shared=512)
    assert len(block.hazards) == 1 and "reads" in block.hazards[0] and "warp" in block.hazards[0]
    _, block = lanes(body.format(""), 128, shared=512, hazards=False)
    assert not block.hazards


def test_overwriting_what_another_warp_has_yet_to_read_is_a_hazard():
    body = PRODUCE + "st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r2, [%r6]; {} st.shared.b32 [%r5], %r4;"
    assert not lanes(body.format("bar.sync 0;"), 128, shared=512)[1].hazards
    (hazard,) = lanes(body.format(""), 128, shared=512)[1].hazards
    assert "after a read by another warp" in hazard


def test_two_warps_that_write_one_word_are_a_hazard_unless_they_write_the_same():
    same, other = "st.shared.b32 [memory], 7;", "st.shared.b32 [memory], %r0;"
    assert not lanes(f"{same} mov.u32 %r2, 0;", 64, shared=64)[1].hazards
    (hazard,) = lanes(f"{other} mov.u32 %r2, 0;", 64, shared=64)[1].hazards
    assert "as does another warp" in hazard
    # Neighbouring bytes are no conflict.
    bytes_ = "mov.u32 %r3, memory; add.s32 %r3, %r3, %r0; st.shared.u8 [%r3], %r0; mov.u32 %r2, 0;"
    assert not lanes(bytes_, 64, shared=64)[1].hazards


def test_one_warp_alone_needs_no_barrier():
    _, block = lanes(PRODUCE + "st.shared.b32 [%r5], %r0; ld.shared.b32 %r2, [%r5];", 128, shared=512)
    assert not block.hazards


NAMED = """
    mov.u32 %r3, memory; and.b32 %r4, %r0, 31; shl.b32 %r4, %r4, 2; add.s32 %r5, %r3, %r4; mov.u32 %r2, 0;
    setp.lt.u32 %p0, %r0, 32; setp.ge.u32 %p1, %r0, 64;
    @%p1 bra $rest;
    @%p0 st.shared.b32 [%r5], %r0;
    @%p0 bra $arrive;
    bar.sync 1, {count}; ld.shared.b32 %r2, [%r5]; bra $rest;
$arrive: bar.arrive 1, {count};
$rest:
"""


def test_a_named_barrier_orders_the_warps_that_take_part():
    got, block = lanes(NAMED.format(count=64), 96, shared=256)
    assert got == [0] * 32 + list(range(32)) + [0] * 32 and not block.hazards and block.counts["barriers"] == 1
    with pytest.raises(Fault, match=r"unreached barrier: barrier 1 \(line \d+\): 64 of 96 threads"):
        lanes(NAMED.format(count=96), 96, shared=256)
    # The third warp reads without having taken part.
    late = NAMED.format(count=64) + "@%p1 ld.shared.b32 %r2, [%r5];"
    (hazard,) = lanes(late, 96, shared=256)[1].hazards
    assert "warp 2 reads" in hazard


def test_a_barrier_names_its_faults():
    for instruction, what in (
        ("bar.sync 16", "barrier 16 does not exist"),
        ("bar.sync 0, 33", "cannot expect 33 threads"),
        ("bar.sync 0, 128", "cannot expect 128 threads"),
        ("bar.red.popc.u32 %r2, 0, %p0", "is not known"),
    ):
        with pytest.raises(Fault, match=what):
            lanes(f"mov.u32 %r2, 0; {instruction};", 64)


# shuffles -----------------------------------------------------------------------


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX manual's pseudocode of shfl: the lane that is read, and the predicate."""
    segment, b, clamp = c >> 8 & 31, b & 31, c & 31
    highest = (lane & segment) | (clamp & ~segment & 31)
    lowest = lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment & 31)}[mode]
    inside = j >= highest if mode == "up" else j <= highest
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("b", [0, 1, 3, 16, 31, 37])
@pytest.mark.parametrize("c", [31, 0, 7, 0x1800 | 31, 0x1C00, 0x1000 | 15])
def test_shuffles(mode, b, c):
    expected = [shuffled(mode, lane, b, c) for lane in range(32)]
    for operands in (f"{b}, {c}", "%r5, %r6"):
        body = f"""mov.u32 %r5, {b}; mov.u32 %r6, {c}; add.s32 %r3, %r0, 100;
            shfl.sync.{mode}.b32 %r2|%p0, %r3, {operands}, 0xffffffff; selp.b32 %r4, 1, 0, %p0;
            shl.b32 %r4, %r4, 16; or.b32 %r2, %r2, %r4;"""
        got, _ = lanes(body, 64)
        assert got == [(100 + 32 * w + j) | inside << 16 for w in range(2) for j, inside in expected]


def test_shuffle_by_a_lane_of_its_own():
    got, _ = lanes("xor.b32 %r3, %r1, 5; shfl.sync.idx.b32 %r2, %r0, %r3, 31, -1;", 64)
    assert got == [t ^ 5 for t in range(64)]


def test_a_shuffle_whose_members_are_not_all_there_is_refused():
    guard = "setp.lt.u32 %p0, %r0, 16; mov.u32 %r2, 0;"
    with pytest.raises(Fault, match="in the member mask|never come"):
        lanes(f"{guard} @%p0 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;")
    got, _ = lanes(f"{guard} @%p0 shfl.sync.bfly.b32 %r2, %r0, 1, 31, 0xffff;")
    assert got == [t ^ 1 for t in range(16)] + [0] * 16
    with pytest.raises(Fault, match="takes no part"):
        lanes(f"{guard} @%p0 shfl.sync.bfly.b32 %r2, %r0, 16, 31, 0xffff;")
    with pytest.raises(Fault, match="not in its own member mask"):
        lanes(f"{guard} shfl.sync.bfly.b32 %r2, %r0, 1, 31, 0xffff;")


def test_lanes_that_arrive_later_are_waited_for():
    """The slow path lies behind the shuffle in the code, so the lowest statement is the shuffle's."""
    got, _ = lanes("""
        setp.eq.u32 %p0, %r1, 3; mov.u32 %r3, %r0; @%p0 bra $slow;
    $join: shfl.sync.idx.b32 %r2, %r3, 3, 31, -1; bra $end;
    $slow: add.s32 %r3, %r3, 1000; bra $join;
    $end:""", 64)  # fmt: skip
    assert got == [1003] * 32 + [1035] * 32


def test_votes_and_reductions():
    prologue = "setp.lt.u32 %p0, %r1, 3; setp.ge.u32 %p1, %r0, 0; and.b32 %r3, %r0, 1; add.s32 %r4, %r0, 1;"
    results = {
        "vote.sync.ballot.b32 %r2, %p0, -1;": [7] * 64,
        "vote.sync.ballot.b32 %r2, !%p0, -1;": [0xFFFFFFF8] * 64,
        "vote.sync.any.pred %p2, %p0, -1; selp.b32 %r2, 1, 0, %p2;": [1] * 64,
        "vote.sync.all.pred %p2, %p0, -1; selp.b32 %r2, 1, 0, %p2;": [0] * 64,
        "vote.sync.all.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;": [1] * 64,
        "vote.sync.uni.pred %p2, !%p1, -1; selp.b32 %r2, 1, 0, %p2;": [1] * 64,
        "match.any.sync.b32 %r2, %r3, -1;": [0x55555555, 0xAAAAAAAA] * 32,
        "redux.sync.add.u32 %r2, %r4, -1;": [sum(range(1, 33))] * 32 + [sum(range(33, 65))] * 32,
        "redux.sync.min.u32 %r2, %r4, -1;": [1] * 32 + [33] * 32,
        "redux.sync.xor.b32 %r2, %r4, -1;": [32] * 32 + [32 ^ 64] * 32,
        "activemask.b32 %r2;": [0xFFFFFFFF] * 64,
        "elect.sync %r2|%p2, -1; selp.b32 %r2, 1, 0, %p2;": ([1] + [0] * 31) * 2,
    }
    for body, expected in results.items():
        assert lanes(prologue + body, 64)[0] == expected, body
    got, _ = lanes("mov.u32 %r2, 0; setp.lt.u32 %p0, %r1, 5; @%p0 bra $in; bra $out; $in: activemask.b32 %r2; $out:")
    assert got == [31] * 5 + [0] * 27


def test_bar_warp_sync_waits_for_its_lanes():
    got, _ = lanes("""
        mov.u32 %r2, 0; setp.lt.u32 %p0, %r0, 8; @%p0 bra $a; bra $b;
    $a: bar.warp.sync 0xff; mov.u32 %r2, 1;
    $b:""")  # fmt: skip
    assert got == [1] * 8 + [0] * 24
    with pytest.raises(Fault, match="never come"):
        lanes("mov.u32 %r2, 0; setp.lt.u32 %p0, %r0, 8; @%p0 bra $a; bra $b; $a: bar.warp.sync 0xffff; $b:")
