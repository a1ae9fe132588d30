"""The simulated GPU's matrices, in registers and in shared memory, against the formulas of the PTX manual."""
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from assembly import place, run


def halves_of(dtype, *shape):
    """Random numbers of 16 bits -> (as bits, in float64)."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.view(torch.int16).numpy().view(np.uint16), x.double().numpy()


def registers(count, base):
    return "{" + ", ".join(f"%r{base + n}" for n in range(count)) + "}"


def loads(array, count, base):
    """Text that loads `count` registers of each thread from array n, (count, threads)."""
    lines = [place(array, 4)]
    return " ".join(lines + [f"ld.global.b32 %r{base + n}, [%rd99 + {128 * n}];" for n in range(count)])


def stores(array, count, base):
    return f"{place(array, 4)} " + " ".join(f"st.global.b32 [%rd99 + {128 * n}], %r{base + n};" for n in range(count))


def a_place(lane, register, half):
    """(row, column) of A in mma.m16n8k16, by the manual's groupID and threadID_in_group."""
    i = 2 * register + half
    row = lane // 4 if i < 2 or 4 <= i < 6 else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane, register, half):
    i = 2 * register + half
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def d_place(lane, register):
    return lane // 4 + (8 if register >= 2 else 0), lane % 4 * 2 + (register & 1)


def packed(matrix, count, where):
    """(count, 32) registers of a matrix of 16 bits."""
    out = np.zeros((count, 32), np.uint32)
    for n in range(count):
        for lane in range(32):
            low, high = (int(matrix[where(lane, n, half)]) for half in (0, 1))
            out[n, lane] = low | high << 16
    return out


@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mma(kind, dtype):
    (a_bits, A), (b_bits, B) = halves_of(dtype, 16, 16), halves_of(dtype, 16, 8)
    C = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    c = np.array([[C[d_place(lane, n)] for lane in range(32)] for n in range(4)]).view(np.uint32)
    d = np.zeros((4, 32), np.float32)
    run(f"{loads(0, 4, 10)} {loads(1, 2, 20)} {loads(2, 4, 30)}"
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {registers(4, 40)}, {registers(4, 10)}, "
        f"{registers(2, 20)}, {registers(4, 30)}; {stores(3, 4, 40)}",
        packed(a_bits, 4, a_place), packed(b_bits, 2, b_place), c, d)
    want = (A @ B + C).astype(np.float32)
    assert all(d[n, lane] == want[d_place(lane, n)] for n in range(4) for lane in range(32))


def test_mma_of_tf32_drops_thirteen_bits():
    random = np.random.default_rng(0)
    A, B = random.standard_normal((16, 8)).astype(np.float32), random.standard_normal((8, 8)).astype(np.float32)
    a = np.array([[A[lane // 4 + 8 * (n % 2), lane % 4 + 4 * (n // 2)] for lane in range(32)] for n in range(4)])
    b = np.array([[B[lane % 4 + 4 * n, lane // 4] for lane in range(32)] for n in range(2)])
    d = np.zeros((4, 32), np.float32)
    zeros = ", ".join(["0"] * 4)
    run(f"{loads(0, 4, 10)} {loads(1, 2, 20)} mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {registers(4, 40)}, "
        f"{registers(4, 10)}, {registers(2, 20)}, {{{zeros}}}; {stores(2, 4, 40)}",
        a.view(np.uint32), b.view(np.uint32), d)
    cut = lambda x: (x.view(np.uint32) >> 13 << 13).view(np.float32).astype(np.float64)
    want = (cut(A) @ cut(B)).astype(np.float32)
    assert all(d[n, lane] == want[d_place(lane, n)] for n in range(4) for lane in range(32))


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("trans", ("", ".trans"))
def test_ldmatrix_and_stmatrix(count, trans):
    """Matrices lie with a row every 32 bytes, the last one first."""
    bits = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    rows = np.zeros((32, 8), np.uint16)
    rows[:8 * count] = bits.reshape(-1, 8)
    address = f"sub.s32 %r1, {8 * count - 1}, %r0; max.s32 %r1, %r1, 0; shl.b32 %r1, %r1, 5;"
    first = f"setp.lt.s32 %p1, %r0, {8 * count};"
    back, out = np.zeros((32, 8), np.uint16), np.zeros((count, 32), np.uint32)
    run(f"""{address} {first} {place(0, 16)} ld.global.v4.b32 {registers(4, 10)}, [%rd99];
        @%p1 st.shared.v4.b32 [%r1], {registers(4, 10)};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(count, 20)}, [%r1];
        {stores(1, count, 20)}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1 + 16], {registers(count, 20)};
        {place(2, 16)} @%p1 ld.shared.v4.b32 {registers(4, 30)}, [%r1 + 16];
        @%p1 st.global.v4.b32 [%rd99], {registers(4, 30)};""", rows, out, back, shared=32 * 8 * count)
    for n in range(count):
        for lane in range(32):
            for half in (0, 1):
                row, column = lane // 4, lane % 4 * 2 + half
                want = bits[n, column, row] if trans else bits[n, row, column]
                assert out[n, lane] >> 16 * half & 0xFFFF == want
    np.testing.assert_array_equal(back[:8 * count], rows[:8 * count])


# wgmma. Where an element lies by the manual: rows of the pattern are 128, 64 or 32 bytes, eight of them a block, in
# which chunks of 16 bytes change places; without a pattern a block is eight rows of 16 bytes.

CHUNK_OF_ROW = {128: lambda row: row, 64: lambda row: row // 2, 32: lambda row: row // 4}


def swizzled(row, byte, width):
    """Place of a byte in a block of eight rows of a pattern: within 64 and 32 bytes the 128 bytes of a line count."""
    chunks = width // 16
    return row * width + (byte // 16 ^ CHUNK_OF_ROW[width](row) % chunks) * 16 + byte % 16


def in_memory(matrix, width, transposed):
    """(bytes, leading, stride) of a matrix (size, 16) of 16 bits; transposed: `size` is contiguous."""
    lines = matrix.T if transposed else matrix  # (rows of memory, contiguous)
    size = len(matrix)
    out = np.zeros(64 * 1024, np.uint8)
    used = 0

    def put(value, at):
        nonlocal used
        out[at:at + 2] = np.array([value], np.uint16).view(np.uint8)
        used = max(used, at + 2)

    if width == 16:  # blocks of 8 x 8, those along the 16 follow each other
        for m in range(size):
            for k in range(16):
                block = (m // 8 * 2 + k // 8) * 128
                put(matrix[m, k], block + (k % 8 * 16 + m % 8 * 2 if transposed else m % 8 * 16 + k % 8 * 2))
        return out[:used], 128, 256
    if not transposed:
        for m in range(size):
            for k in range(16):
                put(lines[m, k], m // 8 * 8 * width + swizzled(m % 8, 2 * k, width))
        return out[:used], 16, 8 * width
    across = width // 2  # elements of a row of the pattern
    for k in range(16):
        for m in range(size):
            block = (m // across * 2 + k // 8) * 8 * width
            put(lines[k, m], block + swizzled(k % 8, m % across * 2, width))
    return out[:used], 16 * width, 8 * width


def descriptor(start, leading, stride, width):
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[width]
    return start // 16 | leading // 16 << 16 | stride // 16 << 32 | mode << 62


LAYOUTS = [(width, transposed) for width in (16, 32, 64, 128) for transposed in (False, True)]


@pytest.mark.parametrize("a_layout,b_layout", [*zip(LAYOUTS, reversed(LAYOUTS)), (None, (128, True))], ids=str)
@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_wgmma(a_layout, b_layout, kind, dtype):
    """(64, 16) @ (16, 64) twice into one accumulator, which the first product begins."""
    (a_bits, A), (b_bits, B) = halves_of(dtype, 64, 16), halves_of(dtype, 65, 16)
    b_bits, B = b_bits[:64], B[:64]
    parts, starts, setup = [], [], ""
    for matrix, layout in ((a_bits, a_layout), (b_bits, b_layout)):
        if layout:
            data, leading, stride = in_memory(matrix, *layout)
            starts.append(descriptor(8192 * len(parts), leading, stride, layout[0]))
            parts.append(np.resize(np.append(data, np.zeros(8192 - len(data), np.uint8)), 8192))
    memory = np.concatenate(parts)
    for n in range(len(memory) // 2048):  # 128 threads of 16 bytes
        setup += f"ld.global.v4.b32 {registers(4, 10)}, [%rd99 + {2048 * n}]; st.shared.v4.b32 [%r2 + {2048 * n}], "
        setup += f"{registers(4, 10)};\n"
    transposed = [str(int(layout[1])) for layout in (a_layout, b_layout) if layout]
    if a_layout:
        left = "%rd1"
        setup += f"mov.b64 %rd1, {starts[0]};"
        rows = np.zeros((4, 128), np.uint32)
    else:
        left = registers(4, 20)
        rows = np.concatenate([packed(a_bits[16 * warp:16 * warp + 16], 4, a_place) for warp in range(4)], 1)
    setup += f"mov.b64 %rd2, {starts[-1]};"
    call = (f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} {registers(32, 100)}, {left}, %rd2, %p1, 1, 1, "
            f"{', '.join(transposed)};")
    results = " ".join(f"st.global.b32 [%rd99 + {512 * n}], %r{100 + n};" for n in range(32))
    out = np.zeros((32, 128), np.float32)
    run(f"""{place(0, 16)} shl.b32 %r2, %r0, 4; {setup} {place(1, 4)}
        {" ".join(f"ld.global.b32 %r{20 + n}, [%rd99 + {512 * n}];" for n in range(4))}
        bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;
        setp.eq.b32 %p1, 0, 1; {call} setp.eq.b32 %p1, 0, 0; {call}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {place(2, 4)} {results}""",
        memory, rows, out, threads=128, shared=len(memory))
    want = (A @ B.T).astype(np.float32)
    want = (A @ B.T + want).astype(np.float32)
    for n in range(32):
        for thread in range(128):
            row = thread // 32 * 16 + thread % 32 // 4 + n % 4 // 2 * 8
            column = n // 4 * 8 + thread % 4 * 2 + n % 2
            assert out[n, thread] == want[row, column], (n, thread)
