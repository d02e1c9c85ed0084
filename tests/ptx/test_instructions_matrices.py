"""ldmatrix, stmatrix, mma and wgmma against the fragment tables of the PTX manual, written out lane by lane."""

import numpy as np
import pytest

from .fault import Fault
from .programs import run

TID = "mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid;"


def copy_to_shared(nbytes: int) -> str:
    """Each lane copies so many bytes from [%d0] to shared memory at [%r3]."""
    return "".join(
        f"ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d0+{k}]; st.shared.v4.b32 [%r3+{k}], {{%r4, %r5, %r6, %r7}};"
        for k in range(0, nbytes, 16)
    )


# ldmatrix and stmatrix ------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    """Lane 8 i + j names row j of matrix i; lane l gets row l / 4, columns 2 (l % 4) and the next, of each."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 2**16, 64 * 32).astype(np.uint16)
    rows = rng.permutation(256)[:64].astype(np.uint32) * 16  # a row of 16 bytes for every lane of two warps
    out = np.zeros((64, count), np.uint32)
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    run(f"""{TID}
        shl.b32 %r2, %r0, 6; mov.u32 %r3, memory; add.s32 %r3, %r3, %r2; mad.wide.u32 %d0, %r0, 64, %content;
        {copy_to_shared(64)}
        bar.sync 0;
        mad.wide.u32 %d1, %r0, 4, %rows; ld.global.b32 %r8, [%d1]; mov.u32 %r9, memory; add.s32 %r8, %r8, %r9;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r8];
        mad.wide.u32 %d2, %r0, {4 * count}, %out;
        {"".join(f'st.global.b32 [%d2+{4 * k}], %r{10 + k};' for k in range(count))}""",
        threads=64, shared=4096, content=content, rows=rows, out=out)  # fmt: skip
    for warp in range(2):
        for lane in range(32):
            for i in range(count):
                matrix = np.array([content[rows[32 * warp + 8 * i + j] // 2 :][:8] for j in range(8)])
                row, column = lane // 4, 2 * (lane % 4)
                low, high = (matrix[row, column], matrix[row, column + 1])
                if trans:
                    low, high = matrix[column, row], matrix[column + 1, row]
                assert out[32 * warp + lane, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(count, trans):
    out = np.zeros((32, count), np.uint32)
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    back = ", ".join(f"%r{20 + k}" for k in range(count))
    values = "".join(f"mad.lo.s32 %r{10 + k}, %r0, {65537 + 1000 * k}, {7 + k};" for k in range(count))
    run(f"""{TID} shl.b32 %r2, %r0, 4; mov.u32 %r3, memory; add.s32 %r3, %r3, %r2;
        {values}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3], {{{registers}}};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{back}}}, [%r3];
        mad.wide.u32 %d2, %r0, {4 * count}, %out;
        {"".join(f'st.global.b32 [%d2+{4 * k}], %r{20 + k};' for k in range(count))}""",
        shared=512, out=out)  # fmt: skip
    assert out.tolist() == [[(t * (65537 + 1000 * k) + 7 + k) for k in range(count)] for t in range(32)]


def test_stmatrix_writes_the_rows_that_the_lanes_name():
    out = np.zeros((8, 8), np.uint16)
    run(f"""{TID} shl.b32 %r2, %r0, 5; mov.u32 %r3, memory; add.s32 %r3, %r3, %r2;
        shl.b32 %r4, %r1, 1; add.s32 %r5, %r4, 1; shl.b32 %r5, %r5, 16; or.b32 %r4, %r4, %r5;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {{%r4}}; bar.sync 0;
        setp.ge.u32 %p0, %r0, 8; @%p0 exit;
        ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r3]; mad.wide.u32 %d0, %r0, 16, %out;
        st.global.v4.b32 [%d0], {{%r6, %r7, %r8, %r9}};""", shared=1024, out=out)  # fmt: skip
    assert out.tolist() == np.arange(64).reshape(8, 8).tolist()


def test_matrices_need_the_whole_warp_aligned_rows_and_their_own_memory():
    for body, what in (
        (
            "setp.lt.u32 %p0, %r0, 8; @%p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [memory];",
            "never come|not all lanes",
        ),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [memory+8];", "misaligned"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [memory+64];", "out of bounds"),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2}, [memory];", "expected 2 values"),
        ("ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r2}, [memory];", "not known"),
    ):
        with pytest.raises(Fault, match=what):
            run(f"{TID} {body}", shared=64)


# mma ------------------------------------------------------------------------------


def a_place(type_: str, rows: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of A's element i in a lane: the manual's tables for each shape."""
    group, thread = lane // 4, lane % 4
    if type_ == "f64" or type_ == "tf32":
        if rows == 8:  # m8n8k4
            return group, thread
        return group + 8 * (i % 2), thread + 4 * (i // 2)
    # 16 bits: a0,a1 | a2,a3 (row + 8) | a4,a5 (column + 8) | a6,a7 (both)
    return group + (8 if i in (2, 3, 6, 7) else 0), 2 * thread + (i & 1) + (8 if i >= 4 else 0)


def b_place(type_: str, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane // 4, lane % 4
    if type_ == "f64" or type_ == "tf32":
        return thread + 4 * i, group
    return 2 * thread + (i & 1) + (8 if i >= 2 else 0), group


def c_place(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + (i & 1)


def encode(values: np.ndarray, type_: str) -> np.ndarray:
    """The bits of numbers that the type holds exactly."""
    if type_ == "f64":
        return values.astype(np.float64).view(np.uint64)
    if type_ == "tf32":
        return values.astype(np.float32).view(np.uint32)
    if type_ == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    "type_, shape",
    [("f64", (8, 8, 4)), ("f64", (16, 8, 4)), ("f64", (16, 8, 8)), ("f64", (16, 8, 16)), ("tf32", (16, 8, 4)),
     ("tf32", (16, 8, 8)), ("bf16", (16, 8, 8)), ("bf16", (16, 8, 16)), ("f16", (16, 8, 8)), ("f16", (16, 8, 16))],
)  # fmt: skip
def test_mma(type_, shape):
    rows, columns, depth = shape
    rng = np.random.default_rng(0)
    warps = 2
    a = rng.integers(-20, 20, (warps, rows, depth)).astype(np.float64)
    b = rng.integers(-20, 20, (warps, depth, columns)).astype(np.float64)
    c = rng.integers(-99, 99, (warps, rows, columns)) + 0.5
    result = "f64" if type_ == "f64" else "f32"
    bits = {"f64": 64, "tf32": 32, "bf16": 16, "f16": 16}[type_]
    counts = rows * depth // 32, depth * columns // 32, rows * columns // 32

    def fragment(matrix, place, count, as_type):
        values = np.array(
            [[matrix[w][place(lane, i)] for i in range(count)] for w in range(warps) for lane in range(32)]
        )
        return encode(values, as_type)

    in_a = fragment(a, lambda lane, i: a_place(type_, rows, lane, i), counts[0], type_)
    in_b = fragment(b, lambda lane, i: b_place(type_, lane, i), counts[1], type_)
    in_c = fragment(c, c_place, counts[2], "f64" if result == "f64" else "tf32")
    if type_ == "tf32":  # the tensor cores do not see the low 13 bits
        in_a = in_a | 0x1FFF
    out = np.zeros_like(in_c)
    prefix, word = ("d", 8) if type_ == "f64" else ("r", 4)
    registers = [[f"%{prefix}{start + k}" for k in range(n * max(bits, 8 * word if bits > 16 else bits) // 8 // word)]
                 for start, n in ((40, counts[0]), (60, counts[1]))]  # fmt: skip
    registers.append([f"%{prefix}{70 + k}" for k in range(counts[2])])
    lines = [TID]
    for name, regs, values in zip("abc", registers, (in_a, in_b, in_c)):
        lines.append(f"mad.wide.u32 %d0, %r0, {values.shape[1] * values.itemsize}, %in_{name};")
        lines += [f"ld.global.b{8 * word} {r}, [%d0+{word * k}];" for k, r in enumerate(regs)]
    groups = ["{" + ", ".join(regs) + "}" for regs in (registers[2], *registers)]
    lines.append(
        f"mma.sync.aligned.m{rows}n{columns}k{depth}.row.col.{result}.{type_}.{type_}.{result} {', '.join(groups)};"
    )
    lines.append(f"mad.wide.u32 %d0, %r0, {out.shape[1] * word}, %out;")
    lines += [f"st.global.b{8 * word} [%d0+{word * k}], {r};" for k, r in enumerate(registers[2])]
    block = run("\n".join(lines), 32 * warps, in_a=in_a, in_b=in_b, in_c=in_c, out=out)
    expected = a @ b + c
    values = out.view(np.float64 if result == "f64" else np.float32)
    for w in range(warps):
        for lane in range(32):
            for i in range(counts[2]):
                assert values[32 * w + lane, i] == expected[w][c_place(lane, i)]
    assert block.counts["mma"] == 1


def test_mma_needs_the_whole_warp_and_a_known_shape():
    text = "mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{%r2,%r3,%r4,%r5}}, {a}, {b}, {{%r2,%r3,%r4,%r5}};"
    with pytest.raises(Fault, match="never come|not all lanes"):
        run(f"{TID} setp.lt.u32 %p0, %r0, 16; @%p0 " + text.format(t="bf16", a="{%r6,%r7}", b="{%r8}"))
    with pytest.raises(Fault, match="expected 2 values"):
        run(text.format(t="bf16", a="{%r6,%r7,%r8,%r9}", b="{%r8}"))
    with pytest.raises(Fault, match="is not known"):
        run(text.format(t="s8", a="{%r6,%r7}", b="{%r8}"))


# wgmma ----------------------------------------------------------------------------


def swizzled(offset: int, width: int) -> int:
    """The number of a 16-byte piece within its row is xored with the number of the 128-byte line it lies in."""
    return offset ^ (offset // 128 % (width // 16)) * 16


def place_k_major(matrix: np.ndarray, start: int, width: int, size: int) -> dict[int, float]:
    """[rows, K] with each row's numbers side by side in ``width`` bytes; eight rows are an atom."""
    return {
        swizzled(start + r * width + k * size, width): matrix[r, k]
        for r in range(matrix.shape[0])
        for k in range(matrix.shape[1])
    }


def place_mn_major(
    matrix: np.ndarray, start: int, width: int, size: int, leading: int, stride: int
) -> dict[int, float]:
    """[rows, K] with each column's numbers side by side: atoms of 8 columns by ``width`` bytes of rows."""
    per = width // size
    return {
        swizzled(start + r // per * leading + k // 8 * stride + k % 8 * width + r % per * size, width): matrix[r, k]
        for r in range(matrix.shape[0])
        for k in range(matrix.shape[1])
    }


def descriptor(start: int, leading: int, stride: int, width: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {128: 1, 64: 2, 32: 3}[width] << 62


def wgmma_program(type_, columns, a_registers, width, transpose, finish, before="", twice=False):
    """Fill shared memory from ``content``, fence, multiply, and store the accumulators."""
    depth = 8 if type_ == "tf32" else 16
    d = "{" + ", ".join(f"%r{20 + i}" for i in range(columns // 2)) + "}"
    flags = "" if type_ == "tf32" else f", {transpose}" if a_registers else f", {transpose}, {transpose}"
    a = "{%r10, %r11, %r12, %r13}" if a_registers else "%d10"
    product = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{type_}.{type_} {d}, {a}, %d11, %p1, 1, 1{flags};"
    )
    fill = copy_to_shared(128)
    loads = "".join(f"ld.global.b32 %r{10 + k}, [%d1+{4 * k}];" for k in range(4))
    return f"""{TID}
        shl.b32 %r2, %r0, 7; mov.u32 %r3, memory; add.s32 %r3, %r3, %r2; mad.wide.u32 %d0, %r0, 128, %content; {fill}
        mad.wide.u32 %d1, %r0, 16, %in_a; {loads}
        ld.global.b64 %d10, [%descriptors]; ld.global.b64 %d11, [%descriptors+8];
        {"".join(f"mov.b32 %r{20 + i}, 0f3F800000;" for i in range(columns // 2))}
        setp.eq.u32 %p1, %r0, %r0; {before}
        bar.sync 0;
        wgmma.fence.sync.aligned; {product} {product if twice else ""}
        wgmma.commit_group.sync.aligned; {finish}
        mad.wide.u32 %d2, %r0, {2 * columns}, %out;
        {"".join(f"st.global.b32 [%d2+{4 * i}], %r{20 + i};" for i in range(columns // 2))}"""


WAIT = "wgmma.wait_group.sync.aligned 0;"
FENCE = "fence.proxy.async.shared::cta;"


def wgmma(type_="bf16", columns=16, a_registers=False, width=128, transpose=0, finish=WAIT, before=FENCE, twice=False):
    """Run one product; (result [64, columns], expected, block)."""
    rng = np.random.default_rng(0)
    depth, size = (8, 4) if type_ == "tf32" else (16, 2)
    a, b = (rng.integers(-20, 20, (n, depth)).astype(np.float64) for n in (64, columns))
    content = np.zeros(128 * 128, np.uint8)
    if transpose:
        leading, stride = 8 * width * 2, 8 * width
        places_a = place_mn_major(a, 0, width, size, leading, stride)
        places_b = place_mn_major(b, 8192, width, size, leading, stride)
        words = [descriptor(start, leading, stride, width) for start in (0, 8192)]
    else:
        places_a, places_b = place_k_major(a, 0, width, size), place_k_major(b, 8192, width, size)
        words = [descriptor(start, 0, 8 * width, width) for start in (0, 8192)]
    for places in ({} if a_registers else places_a, places_b):
        for at, value in places.items():
            content[at : at + size] = encode(np.array([value]), type_).view(np.uint8)
    per_lane = 4 if type_ == "tf32" else 8
    in_a = encode(
        np.array([[a[16 * (t // 32) + p[0], p[1]] for p in (a_place(type_, 16, t % 32, i) for i in range(per_lane))]
                  for t in range(128)]), type_)  # fmt: skip
    out = np.zeros((128, columns // 2), np.float32)
    body = wgmma_program(type_, columns, a_registers, width, transpose, finish, before, twice)
    block = run(
        body, 128, shared=128 * 128, content=content, in_a=in_a, descriptors=np.array(words, np.uint64), out=out
    )
    result = np.zeros((64, columns))
    for t in range(128):
        for i in range(columns // 2):
            row, column = c_place(t % 32, i % 4)
            result[16 * (t // 32) + row, 8 * (i // 4) + column] = out[t, i]
    return result, (1 + twice) * (a @ b.T) + 1, block


@pytest.mark.parametrize("type_", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("a_registers", [False, True])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_wgmma(type_, a_registers, width):
    result, expected, block = wgmma(type_, 24, a_registers, width)
    assert (result == expected).all() and not block.hazards and block.counts["mma"] == 1


@pytest.mark.parametrize("width", [32, 64, 128])
def test_wgmma_of_transposed_matrices(width):
    columns = {32: 16, 64: 32, 128: 64}[width]
    result, expected, _ = wgmma("bf16", columns, False, width, transpose=1)
    assert (result == expected).all()


def test_products_of_one_accumulator_may_follow_each_other():
    result, expected, _ = wgmma(twice=True)
    assert (result == expected).all()


def test_results_of_a_product_in_flight_are_not_there():
    for finish in ("", "wgmma.wait_group.sync.aligned 1;"):
        result, _, _ = wgmma(finish=finish)
        assert np.isnan(result).all()
    with pytest.raises(Fault, match="%r20 was changed while a product was to be written to it"):
        wgmma(finish="mov.b32 %r20, 0;" + WAIT)
    with pytest.raises(Fault, match="%r11 was changed while the product"):
        wgmma(a_registers=True, finish="add.s32 %r11, %r11, 1;" + WAIT)


def test_a_product_reads_what_is_fenced_and_not_overwritten():
    assert any("no fence.proxy.async since its write" in h for h in wgmma(before="")[2].hazards)
    late = wgmma(finish="st.shared.b32 [%r3], 0;" + WAIT)[2]
    assert any("overwrites what a matrix product in flight reads" in h for h in late.hazards)
    after = wgmma(finish=WAIT + "st.shared.b32 [%r3], 0;")[2]
    assert any("after a read by another warp" in h for h in after.hazards)
    assert not wgmma(finish=WAIT + "bar.sync 0; st.shared.b32 [%r3], 0;")[2].hazards
