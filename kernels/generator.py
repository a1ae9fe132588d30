"""The generator of ELSA's attention maps in Triton: q * k, a grouped k x k convolution, bias and GELU, and their gradients.

A block of channels is as many whole groups as fill the 16 that a matrix unit takes at least. The product q * k is first laid out block by
block, with zeros between the rows of the image (`padded`): there a tap is one distance for all pixels, so the kernels that read it need no
masks and hardly any address arithmetic. A program computes consecutive pixels of one block. A row of the k x k neighbourhood is one product
(N of them where it is long or its blocks are wide): of (pixels, J * 16), each pixel's k neighbours and a few more to a power of two, with a
matrix that has the groups' weights on the diagonals of its J blocks. For groups of 4 channels that is four times the work, at the rate of
matrix units instead of vector units.

Sums are float32. Nothing is added atomically: the gradient of q * k gathers, that of the weights is partial sums, one per program.
Prefixes as in aggregation.py.
"""
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import aggregation, tuning

SMALLEST = 16  # side of the smallest product that tl.dot takes
WIDEST = 128  # columns of a tile, and channels of a group: the tiles have to fit into shared memory
TILE = 128  # most pixels of a product
CHUNK = 2048  # pixels that one program of dweight_kernel sums, a multiple of TILE


@triton.jit
def pad_kernel(p_a, p_b, p_out, H, W, Q, L, S, edge, s_ab, s_ay, s_ax, s_bb, s_by, s_bx,
               R: tl.constexpr, BC: tl.constexpr, GELU: tl.constexpr, BP: tl.constexpr):
    """out (B, blocks, L, BC): a * b, or with GELU a * the derivative of GELU at b, of (B, H, W, Q); zero where there is no such pixel."""
    n_tiles = tl.cdiv(L, BP)
    b = (tl.program_id(0) // n_tiles).to(tl.int64)
    o_p = tl.program_id(0) % n_tiles * BP + tl.arange(0, BP)
    o_y, o_x = o_p // S - edge, o_p % S - edge
    o_in = tl.arange(0, BC)
    o_c = tl.program_id(1) * R + o_in
    mask = ((o_y >= 0) & (o_y < H) & (o_x >= 0))[:, None] & ((o_in < R) & (o_c < Q))[None, :]  # S - edge = W
    b_a = tl.load(p_a + b * s_ab + (o_y * s_ay + o_x * s_ax)[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + b * s_bb + (o_y * s_by + o_x * s_bx)[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if GELU:
        b_b = 0.5 * (1.0 + tl.erf(b_b * 0.7071067811865476)) + b_b * 0.3989422804014327 * tl.exp(-0.5 * b_b * b_b)
    p_o = p_out + (b * tl.num_programs(1) + tl.program_id(1)) * L * BC + o_p[:, None] * BC + o_in[None, :]
    tl.store(p_o, b_a * b_b, mask=(o_p < L)[:, None])


@triton.jit
def hadamard_kernel(p_h, p_w, p_bias, p_z, p_u, H, W, Q, L, S, products, scale,
                    k: tl.constexpr, DIL: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, J: tl.constexpr, BP: tl.constexpr):
    """z = GELU(u), u = scale * convolution(h) + bias: both (B, H, W, Q); h padded."""
    b_u = _convolution(p_h, p_w, H, L, S, products, k, DIL, BC, N, J, BP)
    b, o_y, o_x, o_c, m_o, m_c = _pixels(H, W, Q, S, R, BC, BP)
    b_u = b_u * scale + tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    o_o = b * H * W * Q + ((o_y * W + o_x) * Q)[:, None] + o_c[None, :]
    tl.store(p_u + o_o, b_u, mask=m_o)
    tl.store(p_z + o_o, b_u * 0.5 * (1.0 + tl.erf(b_u * 0.7071067811865476)), mask=m_o)


@triton.jit
def dqk_kernel(p_du, p_w, p_q, p_k, p_dq, p_dk, H, W, Q, L, S, products, s_qb, s_qy, s_qx, s_kb, s_ky, s_kx, scale,
               k: tl.constexpr, DIL: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, J: tl.constexpr, BP: tl.constexpr):
    """dq = k * dh, dk = q * dh, dh = scale * convolution of du, padded, with the mirrored, transposed weights: both (B, H, W, Q)."""
    b_dh = _convolution(p_du, p_w, H, L, S, products, k, DIL, BC, N, J, BP) * scale
    b, o_y, o_x, o_c, m_o, m_c = _pixels(H, W, Q, S, R, BC, BP)
    b_q = tl.load(p_q + b * s_qb + (o_y * s_qy + o_x * s_qx)[:, None] + o_c[None, :], mask=m_o, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + b * s_kb + (o_y * s_ky + o_x * s_kx)[:, None] + o_c[None, :], mask=m_o, other=0.0).to(tl.float32)
    o_o = b * H * W * Q + ((o_y * W + o_x) * Q)[:, None] + o_c[None, :]
    tl.store(p_dq + o_o, b_dh * b_k, mask=m_o)
    tl.store(p_dk + o_o, b_dh * b_q, mask=m_o)


@triton.jit
def dweight_kernel(p_du, p_h, p_part, H, L, S, edge, chunk, n_chunks,
                   k: tl.constexpr, DIL: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, J: tl.constexpr, BP: tl.constexpr):
    """Of one chunk of a sample's pixels and J taps the sum of h^T du: (B * chunks, blocks, k, N * J, BC, BC) float32, not yet scaled.

    The programs of one chunk follow each other, so that what the first reads the others find in the cache.
    """
    n, part, block = tl.program_id(0) % (k * N), tl.program_id(0) // (k * N), tl.program_id(1)
    p_image = ((part // n_chunks).to(tl.int64) * tl.num_programs(1) + block) * L * BC
    first = part % n_chunks * chunk
    o_p = tl.arange(0, BP)
    p_h += p_image + o_p[:, None] * BC + _neighbours(n, S, k, DIL, BC, N, J)[None, :]
    p_du += p_image + edge * (S + 1) * BC + o_p[:, None] * BC + tl.arange(0, BC)[None, :]
    b_dw = tl.zeros([J * BC, BC], dtype=tl.float32)
    for start in range(first, tl.minimum(first + chunk, H * S), BP):  # beyond the last pixel du is zero
        b_h, b_du = tl.load(p_h + start * BC), tl.load(p_du + start * BC)
        b_dw = tl.dot(tl.trans(b_h), b_du, b_dw, input_precision="ieee")  # [J * BC, BP] @ [BP, BC] -> [J * BC, BC]
    p_part += ((part.to(tl.int64) * tl.num_programs(1) + block) * (k * N) + n) * (J * BC * BC)
    tl.store(p_part + tl.arange(0, J * BC)[:, None] * BC + tl.arange(0, BC)[None, :], b_dw)


@triton.jit
def _convolution(p_h, p_w, H, L, S, products, k: tl.constexpr, DIL: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, J: tl.constexpr, BP: tl.constexpr):
    """[BP, BC] of this program's pixels."""
    n_tiles = tl.cdiv(H * S, BP)
    b = (tl.program_id(0) // n_tiles).to(tl.int64)
    o_p = tl.program_id(0) % n_tiles * BP + tl.arange(0, BP)
    p_h += (b * tl.num_programs(1) + tl.program_id(1)) * L * BC + o_p[:, None] * BC
    p_w += tl.program_id(1) * (k * N * J * BC * BC) + tl.arange(0, J * BC)[:, None] * BC + tl.arange(0, BC)[None, :]
    b_sum = tl.zeros([BP, BC], dtype=tl.float32)
    for n in range(products):  # k * N
        b_h, b_w = tl.load(p_h + _neighbours(n, S, k, DIL, BC, N, J)[None, :]), tl.load(p_w + n * (J * BC * BC))
        b_sum = tl.dot(b_h, b_w, b_sum, input_precision="ieee")  # [BP, J * BC] @ [J * BC, BC] -> [BP, BC]
    return b_sum


@triton.jit
def _neighbours(n, S, k: tl.constexpr, DIL: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, J: tl.constexpr):
    """[J * BC]: how far the channels of the n-th J neighbours are. Those after the k-th of a row, whose weights are zero, are the k-th again."""
    o_n = tl.arange(0, J * BC)
    o_j = tl.minimum(n % N * J + o_n // BC, k - 1)
    return tl.max_contiguous(tl.multiple_of((n // N * S + o_j) * (DIL * BC) + o_n % BC, BC), BC)


@triton.jit
def _pixels(H, W, Q, S, R: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Sample, rows, columns and channels that this program computes, which of all exist, and which of the channels."""
    n_tiles = tl.cdiv(H * S, BP)
    o_p = tl.program_id(0) % n_tiles * BP + tl.arange(0, BP)
    o_y, o_x = o_p // S, o_p % S
    o_in = tl.arange(0, BC)
    o_c = tl.program_id(1) * R + o_in
    m_c = (o_in < R) & (o_c < Q)
    return (tl.program_id(0) // n_tiles).to(tl.int64), o_y, o_x, o_c, ((o_y < H) & (o_x < W))[:, None] & m_c[None, :], m_c


def configs(*shapes):
    """Of (pixels, threads, stages) each."""
    return [dict(BP=pixels, num_warps=threads // aggregation.WARP_SIZE, num_stages=stages, **aggregation.registers(255))
            for pixels, threads, stages in shapes]


def forward(q, k, weight, bias, scale, dilation):
    """z, u (B, H, W, Q). q, k (B, H, W, Q), their channels side by side; weight (Q, width, k, k); bias (Q,)."""
    s = _Setting(q, weight, dilation)
    z, u = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    h, matrices = s.padded(q, k), s.matrices(weight, mirrored=False)

    def launch(**config):
        hadamard_kernel[s.grid(config)](h, matrices, bias, z, u, *s.sizes, scale, **s.constants, **config)

    tuning.launch("hadamard", s.key, configs((128, 128, 2), (64, 128, 2), (128, 256, 3)), launch, q.device)
    return z, u


def backward(dz, u, q, k, weight, scale, dilation):
    """dq, dk (B, H, W, Q), dweight (Q, width, k, k) and dbias (Q,), both float32. dz (B, H, W, Q), its channels side by side."""
    s = _Setting(q, weight, dilation)
    dq, dk = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    du, h, matrices = s.padded(dz, u, GELU=True), s.padded(q, k), s.matrices(weight, mirrored=True)

    def launch_dqk(**config):
        dqk_kernel[s.grid(config)](du, matrices, q, k, dq, dk, *s.sizes, *q.stride()[:3], *k.stride()[:3], scale, **s.constants, **config)

    tuning.launch("dqk", s.key, configs((128, 128, 2), (64, 128, 2), (128, 256, 3)), launch_dqk, q.device)
    n_chunks, side, N, J, BC = triton.cdiv(s.H * s.S, CHUNK), *(s.constants[name] for name in ("k", "N", "J", "BC"))
    parts = torch.empty(s.B * n_chunks, s.blocks, side, N * J, BC, BC, dtype=torch.float32, device=q.device)

    def launch_dweight(**config):
        dweight_kernel[(s.B * n_chunks * side * N, s.blocks)](du, h, parts, s.H, s.L, s.S, s.edge, CHUNK, n_chunks, **s.constants, **config)

    tuning.launch("dweight", s.key, configs((128, 128, 2), (128, 256, 2), (64, 128, 3)), launch_dweight, q.device)
    dbias = du.sum((0, 2), dtype=torch.float32)[:, :s.constants["R"]].flatten()[:s.Q]
    return dq, dk, s.groups(parts.sum(0)) * scale, dbias


class _Setting:
    """What every launch needs: sizes and compile-time constants, and tensors as the kernels read them.

    Pixel (y, x) of a padded image lies at (y + edge) * S + x + edge, S = W + edge: what is left of a row is right of the row before.
    """

    def __init__(self, q, weight, dilation):
        self.B, self.H, self.W, self.Q = q.shape
        self.width, side = weight.shape[1:3]
        self.per_block = max(1, SMALLEST // self.width)  # groups
        R = self.per_block * self.width
        self.blocks = triton.cdiv(self.Q, R)
        self.edge = side // 2 * dilation
        self.S = self.W + self.edge
        self.L = triton.cdiv(self.H * self.S, TILE) * TILE + 2 * self.edge * (self.S + 1)  # pixels that the last program reads
        self.dtype = torch.float32 if os.environ.get("TRITON_INTERPRET") == "1" else q.dtype  # the interpreter gets 16-bit products wrong
        BC = max(SMALLEST, triton.next_power_of_2(R))
        J = min(triton.next_power_of_2(side), max(1, WIDEST // BC))
        N = triton.cdiv(side, J)
        self.constants = dict(k=side, DIL=dilation, R=R, BC=BC, N=N, J=J, enable_fp_fusion=True)
        self.sizes = (self.H, self.W, self.Q, self.L, self.S, side * N)
        self.key = dict(dtype=str(q.dtype)[6:], k=side, dilation=dilation, width=self.width, channels=self.Q,
                        pixels=triton.next_power_of_2(max(1, self.H * self.W)))

    def grid(self, config):
        return self.B * triton.cdiv(self.H * self.S, config["BP"]), self.blocks

    def padded(self, a, b, GELU=False):
        R, BC, BP = self.constants["R"], self.constants["BC"], 64
        out = torch.empty(self.B, self.blocks, self.L, BC, dtype=self.dtype, device=a.device)
        pad_kernel[(self.B * triton.cdiv(self.L, BP), self.blocks)](
            a, b, out, self.H, self.W, self.Q, self.L, self.S, self.edge, *a.stride()[:3], *b.stride()[:3],
            R=R, BC=BC, GELU=GELU, BP=BP, enable_fp_fusion=True)
        return out

    def matrices(self, weight, mirrored):
        """(blocks, k, N * J, BC, BC): tap by tap from input to output channel; mirrored: from output to input, the taps in reverse."""
        w, k, n = self.width, self.constants["k"], self.per_block
        groups = weight.new_zeros(self.blocks * n, w, w, k * k)  # (groups, out, in, K)
        groups[:self.Q // w] = weight.reshape(self.Q // w, w, w, k * k)
        groups = groups.view(self.blocks, n, w, w, k * k).permute((0, 4, 2, 3, 1) if mirrored else (0, 4, 3, 2, 1))  # (blocks, K, rows, columns, n)
        matrices = weight.new_zeros(self.blocks, k * k, n, w, n, w)
        matrices.diagonal(dim1=2, dim2=4).copy_(groups.flip(1) if mirrored else groups)
        extra = self.constants["BC"] - n * w
        matrices = matrices.reshape(self.blocks, k, k, n * w, n * w)
        return F.pad(matrices, (0, extra, 0, extra, 0, self.constants["N"] * self.constants["J"] - k)).to(self.dtype).contiguous()

    def groups(self, matrices):
        """The reverse of matrices: (blocks, k, N * J, BC, BC) -> (Q, width, k, k)."""
        w, n, k = self.width, self.per_block, self.constants["k"]
        matrices = matrices[:, :, :k, :n * w, :n * w].reshape(self.blocks, k * k, n, w, n, w).diagonal(dim1=2, dim2=4)  # (blocks, K, in, out, n)
        return matrices.permute(0, 4, 3, 2, 1).reshape(-1, w, k, k)[:self.Q].contiguous()
