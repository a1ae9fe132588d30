"""Instructions that exchange between threads: shuffles, matrices in registers and in shared memory, their products.

The layouts are those of the PTX manual: thread T of a warp holds of a matrix with 8 rows of 16 bytes row T // 4, and in
it the two 16-bit elements from column T % 4 * 2 on. For the functions' signature see arithmetic.py.
"""
import itertools
import re

import numpy as np

from .decoding import names
from .memory import Fault
from .values import READ_16_BITS, halves, joined

T = np.arange(32)
ROW, COLUMN = T // 4, T % 4 * 2


def whole_warps(threads, mask, warps=1):
    """Raises a Fault unless all threads of a warp, or a group of four, take part or none does."""
    taking = mask.reshape(-1, 32 * warps)
    if (taking.any(1) != taking.all(1)).any():
        raise Fault("not all threads of a warp take part, or not all four warps")


def shuffle(threads, i, mask):
    """shfl.sync: the register of another thread of the warp, one's own where that would be outside."""
    whole_warps(threads, mask)
    target, _, inside_name = i.operands[0].partition("|")
    value, by = threads.lanes_of(i.operands[1], np.uint32), threads.lanes_of(i.operands[2], np.uint32).astype(int)
    mode = i.modifiers[-1]
    last, members = int(i.operands[3], 0), int(i.operands[4], 0) & 0xFFFFFFFF
    if last != (0 if mode == "up" else 31) or members != 0xFFFFFFFF:
        threads.unknown(i)
    lane = threads.lane % 32
    by = by % 32
    source = {"bfly": lane ^ by, "idx": by, "down": lane + by, "up": lane - by}[mode]
    inside = (source >= 0) & (source <= 31)
    source = np.where(inside, source, lane)
    threads.write(target, value[threads.lane - lane + source], mask)
    if inside_name:
        threads.write(inside_name, inside, mask)


def elect(threads, i, mask):
    """elect.sync: one thread of a warp, here the first."""
    whole_warps(threads, mask)
    threads.write(i.operands[0].partition("|")[2], threads.lane % 32 == 0, mask)


def _rows(threads, i, mask, operand):
    """(number of matrices, (rows, 16) places in shared memory): thread n of a warp gives the address of row n."""
    whole_warps(threads, mask)
    count = int(next(part for part in i.parts if part in ("x1", "x2", "x4"))[1])
    rows = mask & (threads.lane % 32 < 8 * count)
    where = threads.shared_places(threads.address(operand, np.uint32), 16, rows)
    return count, where, threads.own[rows], threads.warp[rows]


def load_matrices(threads, i, mask):
    """ldmatrix: of 8 x 8 16-bit elements each; .trans hands a thread two elements of a column."""
    if not mask.any():
        return
    count, where, programs, warps = _rows(threads, i, mask, i.operands[1])
    data = np.ascontiguousarray(threads.shared.read(where, programs, warps))
    matrices = data.view(np.uint16).reshape(-1, count, 8, 8)  # (warps, count, row, column)
    if "trans" in i.parts:
        matrices = matrices.transpose(0, 1, 3, 2)
    for n, name in enumerate(names(i.operands[0])):
        out = np.zeros(threads.lanes, np.uint32)
        out[mask] = joined(matrices[:, n, ROW, COLUMN], matrices[:, n, ROW, COLUMN + 1]).ravel()
        threads.write(name, out, mask)


def store_matrices(threads, i, mask):
    """stmatrix: the reverse of ldmatrix."""
    if not mask.any():
        return
    registers = [threads.lanes_of(name, np.uint32)[mask].reshape(-1, 32) for name in names(i.operands[1])]
    count, where, programs, warps = _rows(threads, i, mask, i.operands[0])
    matrices = np.zeros((len(registers[0]), count, 8, 8), np.uint16)
    for n, register in enumerate(registers):
        matrices[:, n, ROW, COLUMN], matrices[:, n, ROW, COLUMN + 1] = halves(register)
    if "trans" in i.parts:
        matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
    threads.shared.write(where, matrices.view(np.uint8).reshape(-1, 16), programs, warps)


def product(threads, i, mask):
    """mma.sync: D = A @ B + C of one warp, C and D (16, 8) float32; A (16, 16), B (16, 8) of 16 bits, or half as deep
    of tf32."""
    whole_warps(threads, mask)
    shape, types = next(part for part in i.parts if re.fullmatch(r"m\d+n\d+k\d+", part)), i.types
    d, a, b, c = map(names, i.operands)

    def registers(some):
        return [threads.lanes_of(name, np.uint32).reshape(-1, 32) for name in some]

    if types not in (["f32", kind, kind, "f32"] for kind in ("bf16", "f16", "tf32")):
        threads.unknown(i)
    depth = 8 if types[1] == "tf32" else 16
    if shape != f"m16n8k{depth}":
        threads.unknown(i)
    A, B = np.zeros((threads.lanes // 32, 16, depth)), np.zeros((threads.lanes // 32, depth, 8))
    if types[1] == "tf32":  # the 13 lowest bits are not used
        for n, register in enumerate(registers(a)):
            A[:, ROW + n % 2 * 8, T % 4 + n // 2 * 4] = (register & np.uint32(0xFFFFE000)).view(np.float32)
        for n, register in enumerate(registers(b)):
            B[:, T % 4 + n * 4, ROW] = (register & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        A = _left(registers(a), READ_16_BITS[types[1]])
        for n, register in enumerate(registers(b)):
            for odd, part in enumerate(halves(register)):
                B[:, COLUMN + n * 8 + odd, ROW] = READ_16_BITS[types[1]](part)
    D = A @ B  # in float64
    for n, (name, register) in enumerate(zip(d, registers(c))):
        part = D[:, ROW + n // 2 * 8, COLUMN + n % 2] + register.view(np.float32)
        threads.write(name, part.astype(np.float32).ravel(), mask)


def _left(registers, read):
    """A, (warps, 16, 16), of four registers, (warps, 32) each."""
    A = np.zeros((len(registers[0]), 16, 16))
    for n, register in enumerate(registers):
        for odd, part in enumerate(halves(register)):
            A[:, ROW + n % 2 * 8, COLUMN + n // 2 * 8 + odd] = read(part)
    return A


def product_of_four_warps(threads, i, mask):
    """wgmma: D (64, N) = A (64, 16) @ B (16, N) + D if scale says so; B in shared memory, A there or in registers.

    It is done at once, but nobody may read D, nor write over A and B, before wait_group.
    """
    if "fence" in i.parts:
        return
    if "commit_group" in i.parts:
        threads.product_groups.append(threads.products)
        threads.products = []
    elif "wait_group" in i.parts:
        done = max(0, len(threads.product_groups) - int(i.operands[0]))
        for written, read in itertools.chain(*threads.product_groups[:done]):
            for where in read:
                threads.shared.finish_product(where)
        del threads.product_groups[:done]
        waiting = itertools.chain(*threads.product_groups, threads.products)
        threads.promised = {name for written, read in waiting for name in written}
    else:
        _multiply(threads, i, mask)


def _multiply(threads, i, mask):
    whole_warps(threads, mask, 4)
    shape, kind = re.search(r"m64n(\d+)k16", i.text), i.type
    d, a, b, scale, *rest = i.operands
    in_registers = a.startswith("{")
    sign_a, sign_b, *transposed = (int(x) for x in rest)
    if not shape or i.types not in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]) or (sign_a, sign_b) != (1, 1):
        threads.unknown(i)
    if not mask.any():
        return
    N, read, used = int(shape[1]), READ_16_BITS[kind], []
    groups = np.flatnonzero(mask)[::128]  # the first thread of each four warps

    def matrix(operand, size, transposed):
        data, where = _matrix(threads, threads.lanes_of(operand, np.uint64)[groups], groups, size, transposed)
        used.append(where)
        return read(data).astype(np.float64)

    if in_registers:
        registers = [threads.lanes_of(name, np.uint32)[mask].reshape(-1, 32) for name in names(a)]
        A, transposed = _left(registers, read).reshape(-1, 64, 16), [0, *transposed]
    else:
        A = matrix(a, 64, bool(transposed[0]))
    B = matrix(b, N, bool(transposed[1]))  # (groups, N, 16)
    D = (A @ B.transpose(0, 2, 1)).reshape(-1, 16, N)  # (warps, 16, N), in float64
    keep = threads.lanes_of(scale, np.bool_)
    written = names(d)
    threads.promised -= set(written)  # products of one accumulator follow each other without waiting
    for n, name in enumerate(written):
        part = np.zeros(threads.lanes)
        part[mask] = D[:, ROW + n % 4 // 2 * 8, n // 4 * 8 + COLUMN + n % 2].ravel()
        before = np.where(keep, threads.lanes_of(name, np.float32), 0) if keep.any() else 0
        threads.write(name, (part + before).astype(np.float32), mask)
    threads.promised |= set(written)
    threads.products.append((written, used))


SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # of a row of the pattern, by the highest two bits of a descriptor


def _matrix(threads, descriptors, groups, size, transposed):
    """((groups, size, 16) elements, their places in shared memory).

    transposed: `size`, not the 16, is contiguous there. A descriptor has, in units of 16 bytes, the address in bits 0
    to 13, two distances between 8 x 8 blocks in bits 16 to 29 (leading) and 32 to 45 (stride).
    """
    field = lambda at, bits: ((descriptors >> np.uint64(at)) & np.uint64((1 << bits) - 1)).astype(np.int64)
    start, leading, stride = (16 * field(at, 14)[:, None, None] for at in (0, 16, 32))
    mode, = np.unique(field(62, 2))
    if field(49, 3).any():
        raise Fault("a matrix whose pattern does not begin at its address, which is not known here")
    width = SWIZZLED_BYTES[mode]
    m, k = np.arange(size)[None, :, None], np.arange(16)[None, None, :]
    if mode == 0:
        blocks = m // 8 * stride + k // 8 * leading
        at = blocks + (m % 8 * 2 + k % 8 * 16 if transposed else m % 8 * 16 + k % 8 * 2)
    elif transposed:
        at = m // (width // 2) * leading + m % (width // 2) * 2 + k % 8 * width + k // 8 * stride
    else:
        at = m // 8 * stride + m % 8 * width + k * 2
    at = start + at
    at = at ^ ((at >> 7) & (width // 16 - 1)) << 4  # the 16 bytes of a row change places from row to row
    if (at + 2 > threads.shared.limit).any():
        raise Fault(f"a matrix reaches beyond the {threads.shared.limit} bytes of shared memory")
    where = threads.own[groups][:, None, None] * threads.shared.size + at
    threads.counts.matrix(at.size * 2)
    return threads.shared.read_matrix(where, threads.own[groups]), where


def fence(threads, i, mask):
    """fence.proxy.async: what was written becomes visible to wgmma."""
    threads.shared.fence(np.unique(threads.own[mask]))


WGMMA = " ".join(["mma_async sync aligned fence commit_group wait_group", *(f"m64n{n}k16" for n in range(8, 257, 8))])
INSTRUCTIONS = {
    "shfl": (shuffle, "sync bfly idx down up", 1), "elect": (elect, "sync", 0),
    "ldmatrix": (load_matrices, "sync aligned m8n8 x1 x2 x4 trans shared shared_cta", 1),
    "stmatrix": (store_matrices, "sync aligned m8n8 x1 x2 x4 trans shared shared_cta", 1),
    "mma": (product, "sync aligned row col m16n8k16 m16n8k8", 4),
    "wgmma": (product_of_four_warps, WGMMA, None),
    "fence": (fence, "proxy async shared_cta", 0)}
